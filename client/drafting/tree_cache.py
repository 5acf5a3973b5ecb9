"""The draft model's KV cache: the text's rows in order, behind them those of the tree, which grows level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu.attention import attend, move_rows
from ...kernels.metadata import AttentionPlan
from ...peer.model import LayerSpec

_FIRST = 1024
_PAGE = torch.zeros(1, dtype=torch.int32)


class TreeCache:
    """Keys and values of one sequence. Tree rows are numbered from 0, as they were added; -1 is the text's last row."""

    def __init__(self, layers: Sequence[LayerSpec], dtype: torch.dtype = torch.float32) -> None:
        self._keys = [torch.zeros(1, _FIRST, layer.kv_heads, layer.key_width, dtype=dtype) for layer in layers]
        self._values = [torch.zeros(1, _FIRST, layer.kv_heads, layer.value_width, dtype=dtype) for layer in layers]
        self._length = 0
        self._parents: list[int] = []
        self._positions: list[int] = []

    def add(self, parents: Sequence[int]) -> tuple[Tensor, Any]:
        """Tree rows below `parents`: their positions [N] and the attention of the forward that is to store them."""
        stored = len(self._parents)
        for parent in parents:
            self._parents.append(parent)
            self._positions.append(self._length if parent < 0 else self._positions[parent] + 1)
        rows = len(self._parents)
        while self._length + rows > self._keys[0].shape[1]:
            self._grow()
        plan = AttentionPlan(
            row_start=torch.zeros(1, dtype=torch.int32),
            row_count=_int32([rows]),
            base=_int32([self._length]),
            positions=_int32(self._positions),
            parents=_int32(self._parents),
            page_table=_PAGE[None],
            page_size=self._keys[0].shape[1],
            stored=_int32([stored]),
        )

        def attend_rows(layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return attend(query, key, value, self._keys[layer], self._values[layer], plan, **options)

        return plan.positions[stored:].long(), attend_rows

    def commit(self, path: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Tree rows of `path` become text; of the others only `kept` stay, which hang below its end.

        Both are in order; the rows kept are numbered anew, from 0.
        """
        order = [*path, *kept]
        slots = torch.arange(self._length, self._length + len(order), dtype=torch.int32)
        move_rows(self._keys + self._values, _PAGE, _int32(order) + self._length, slots)
        number = {row: new for new, row in enumerate(kept)}
        self._parents = [number.get(self._parents[row], -1) for row in kept]
        self._positions = [self._positions[row] for row in kept]
        self._length += len(path)

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows of the text, and no tree."""
        self._length = min(self._length, length)
        self._parents, self._positions = [], []

    def _grow(self) -> None:
        for rows in (self._keys, self._values):
            rows[:] = [torch.cat((r, torch.zeros_like(r)), dim=1) for r in rows]


def _int32(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int32))
