"""Logits on a card as a sampler on the host reads them: as little comes over as it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

AT_ONCE = 8 << 20  # bytes of logits that come together though not all may be asked for


def on_host(rows: Tensor) -> Tensor:
    """A copy in pinned memory, finished; waiting releases the interpreter."""
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return host


class _Batch:
    """Logits [n, vocab] of one product."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @cached_property
    def best(self) -> list[tuple[float, float]]:
        """Each row's largest logit and its column, of several the first; NaN where there is any."""
        values, columns = self._logits.max(1)
        found: list[tuple[float, float]] = on_host(torch.stack((values.double(), columns.double()), 1)).tolist()
        return found

    def row(self, index: int) -> Any:
        """float32 [vocab] as numpy has it."""
        return (self._all[index] if self._logits.nbytes <= AT_ONCE else on_host(self._logits[index])).float().numpy()

    @cached_property
    def _all(self) -> Tensor:
        return on_host(self._logits)


class CardRow:
    """One row of logits, by numpy's names. Only its largest comes over, unless more is asked for."""

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch, self._index = batch, index

    def argmax(self) -> int:
        """Of equals the first."""
        return int(self._batch.best[self._index][1])

    def max(self) -> float:
        return self._batch.best[self._index][0]

    def astype(self, dtype: Any) -> Any:
        return self._row.astype(dtype)

    def tobytes(self) -> bytes:
        """In float32."""
        taken: bytes = self._row.tobytes()
        return taken

    @cached_property
    def _row(self) -> Any:
        return self._batch.row(self._index)


class CardScores(Sequence[Any]):
    """Rows of logits [n, vocab]."""

    def __init__(self, logits: Tensor) -> None:
        batch = _Batch(logits)
        self._rows = [CardRow(batch, index) for index in range(len(logits))]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> CardRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[CardRow]: ...

    def __getitem__(self, index: int | slice) -> CardRow | list[CardRow]:
        return self._rows[index]
