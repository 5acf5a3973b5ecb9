"""The rows of a training, in an order that only seed and step decide."""

from __future__ import annotations

import torch
from torch import Tensor

from .shape import DistillError
from .texts import Texts

_HELD_OUT = 0.02
_HELD_OUT_MOST = 1024


class Corpus:
    """Rows to train on, and a few held out. Repeated rows and rows without any word that counts are dropped."""

    def __init__(self, texts: Texts, seed: int) -> None:
        kept = _without_repeats(texts.ids)
        kept = kept[texts.own[kept, 1:].any(1)]
        if len(kept) < 2:
            raise DistillError(f"the data has {len(kept)} different rows with words to learn from: give more.")
        held_out = max(1, min(_HELD_OUT_MOST, int(_HELD_OUT * len(kept))))
        self.held_out = texts[kept[:held_out]]
        self._texts, self._kept, self._seed = texts, kept[held_out:], seed
        self._epoch, self._order = -1, kept

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, step: int, rows: int) -> Texts:
        """Rows of one step; every epoch has an order of its own."""
        rows = min(rows, len(self))
        epoch, at = divmod(step, len(self) // rows)
        if epoch != self._epoch:
            shuffle = torch.randperm(len(self), generator=torch.Generator().manual_seed(self._seed + epoch))
            self._epoch, self._order = epoch, self._kept[shuffle]
        return self._texts[self._order[at * rows : (at + 1) * rows]]

    def counts(self, vocab: int) -> Tensor:
        """How often each token counts, [vocab]."""
        rows = self._texts[self._kept]
        return torch.bincount(rows.ids[rows.own].long(), minlength=vocab)


def _without_repeats(ids: Tensor) -> Tensor:
    """Indices of the first of equal rows, in order."""
    key = torch.randint(1 << 62, (ids.shape[1],), generator=torch.Generator().manual_seed(0))
    hashes = (ids.long() * key).sum(1)
    order = hashes.argsort(stable=True)
    first = torch.ones(len(ids), dtype=torch.bool)
    first[1:] = hashes[order][1:] != hashes[order][:-1]
    return order[first].sort().values
