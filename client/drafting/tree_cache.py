"""The draft model's KV cache: the text's rows in order, behind them those of the tree, which grows level by level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.backend import Attend, Backend, LayerSpec
from ...kernels.metadata import AttentionMetadata

_PAGE = 1024


class TreeCache:
    """Keys and values of one sequence. Tree rows are numbered from 0, as they were added; -1 is the text's last row."""

    def __init__(self, backend: Backend, layers: Sequence[LayerSpec]) -> None:
        self._device = backend.device
        # Pages in their order: a row's place is its slot.
        self._storage = backend.kv_storage(layers, 1, _PAGE)
        self._pages = self._int32([[0]])
        self._length = 0
        self._parents: list[int] = []
        self._positions: list[int] = []

    def add(self, parents: Sequence[int]) -> tuple[Tensor, Attend]:
        """Tree rows below `parents`: their positions [N] and the attention of the forward that is to store them."""
        stored = len(self._parents)
        for parent in parents:
            self._parents.append(parent)
            self._positions.append(self._length if parent < 0 else self._positions[parent] + 1)
        rows = len(self._parents)
        if self._length + rows > self._storage.n_pages * _PAGE:
            self._storage.grow(max(2 * self._storage.n_pages, -(-(self._length + rows) // _PAGE)))
            self._pages = self._int32([range(self._storage.n_pages)])
        metadata = AttentionMetadata(
            row_start=self._int32([0]),
            row_count=self._int32([rows]),
            base=self._int32([self._length]),
            positions=self._int32(self._positions),
            parents=self._int32(self._parents),
            page_table=self._pages,
            page_size=_PAGE,
            stored=self._int32([stored]),
        )
        attend = self._storage.attention([metadata] * len(self._storage.layers))
        return metadata.positions[stored:].long(), attend

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

    def _int32(self, values: Sequence[object]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int32)).to(self._device)
