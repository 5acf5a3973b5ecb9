"""The draft model's KV cache: one slot a node, so that a tree grows level by level and a commit moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.attention import attend
from ...kernels.plan import AttentionPlan
from ...peer.span import LayerSpec

_FIRST = 1024


class SlotCache:
    """Keys and values of slots, which come and go in any order. Which slots a row sees is said at each forward."""

    def __init__(self, layers: Sequence[LayerSpec], dtype: torch.dtype = torch.float32) -> None:
        self._keys = [torch.zeros(0, 1, layer.kv_heads, layer.key_width, dtype=dtype) for layer in layers]
        self._values = [torch.zeros(0, 1, layer.kv_heads, layer.value_width, dtype=dtype) for layer in layers]
        self._free: list[int] = []
        self._size = 0

    def take(self, count: int) -> list[int]:
        """Slots for `count` rows; grows where none are free."""
        while len(self._free) < count:
            self._grow()
        return [self._free.pop() for _ in range(count)]

    def give(self, slots: Sequence[int]) -> None:
        self._free.extend(slots)

    def _grow(self) -> None:
        size = max(_FIRST, 2 * self._size)
        for pages in (self._keys, self._values):
            pages[:] = [torch.cat((p, p.new_zeros(size - self._size, *p.shape[1:]))) for p in pages]
        self._free.extend(range(size - 1, self._size - 1, -1))
        self._size = size

    def attention(self, paths: Sequence[Sequence[int]], rows: int) -> tuple[Tensor, Any]:
        """Positions [N] and the attention function of a forward over segments of `rows` rows each.

        `paths` has the slots that a segment's last row sees, in order, its own rows' slots last. Row u of a segment
        stands at position len(path) - rows + u.
        """
        longest = max(map(len, paths))
        table = np.full((len(paths), longest), -1, dtype=np.int32)
        for line, path in zip(table, paths, strict=True):
            line[: len(path)] = path
        bases = np.array([len(path) - rows for path in paths], dtype=np.int32)
        positions = (bases[:, None] + np.arange(rows, dtype=np.int32)).ravel()
        plan = AttentionPlan(
            row_start=torch.arange(0, rows * len(paths), rows, dtype=torch.int32),
            row_count=torch.full((len(paths),), rows, dtype=torch.int32),
            base=torch.from_numpy(bases),
            positions=torch.from_numpy(positions),
            parents=torch.arange(-1, rows - 1, dtype=torch.int32).repeat(len(paths)),
            page_table=torch.from_numpy(table),
            page_size=1,
        )

        def attend_rows(layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return attend(query, key, value, self._keys[layer], self._values[layer], plan, **options)

        return plan.positions.long(), attend_rows
