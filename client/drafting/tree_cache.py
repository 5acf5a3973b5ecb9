"""The draft model's KV cache: the text's rows in order, behind them those of the tree, which grows level by level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.backend import Batch
from ...kernels.metadata import BatchPlan
from ...peer.model import Span

_PAGE = 1024


class TreeCache:
    """Keys and values of one sequence. Tree rows are numbered from 0, as they were added; -1 is the text's last row."""

    def __init__(self, span: Span) -> None:
        self._blocks = range(span.start, span.end)
        # Pages in their order: a row's place is its slot.
        self._storage = span.backend.kv_storage(span.layers, 1, _PAGE, span.backend.kv_dtypes[0])
        self._runner = span.backend.runner(span.forward, self._storage, [0] * len(span.layers))
        self._length = 0
        self._parents: list[int] = []
        self._positions: list[int] = []

    def forward(self, ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Tree rows below `parents`, stored from now on: their hidden states [N, d]."""
        stored = len(self._parents)
        for parent in parents:
            self._parents.append(parent)
            self._positions.append(self._length if parent < 0 else self._positions[parent] + 1)
        rows, pages = len(self._parents), self._storage.n_pages
        if self._length + rows > pages * _PAGE:
            self._storage.grow(max(2 * pages, -(-(self._length + rows) // _PAGE)))
        table = range(self._storage.n_pages)
        plan = BatchPlan([rows], [self._length], self._positions, self._parents, [[table]], _PAGE, [stored])
        return self._runner.run(Batch(torch.tensor(ids), plan, self._blocks))

    def commit(self, path: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Tree rows of `path` become text; of the others only `kept` stay, which hang below its end.

        Both are in order; the rows kept are numbered anew, from 0.
        """
        order = [*path, *kept]
        moved = [(self._length + row, self._length + new) for new, row in enumerate(order) if row != new]
        if moved:
            sources, targets = zip(*moved, strict=True)
            self._storage.move(range(len(self._storage.layers)), sources, targets)
        number = {row: new for new, row in enumerate(kept)}
        self._parents = [number.get(self._parents[row], -1) for row in kept]
        self._positions = [self._positions[row] for row in kept]
        self._length += len(path)

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows of the text, and no tree."""
        self._length = min(self._length, length)
        self._parents, self._positions = [], []
