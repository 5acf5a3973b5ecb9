"""Attention of a ragged batch over pages on a card: plan once a forward, attend once a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compile import Program
from .runtime import Runtime

_TILE, _CHUNK, _SUPER = 64, 128, 1024  # positions: keys are cut there and nowhere else (`triton_attention.py`)
_PLAN = Program("plan.cu", (("TILE", _TILE),))
_LOG2_E = 1.4426950408889634
_BLOCK = 128


@dataclass(frozen=True)
class Extent:
    """What the host knows of a batch: it sizes grids and memory, and decides no bit."""

    queries: int
    segments: int
    longest: int
    """Positions that a query may see."""
    deepest: int
    """Ancestors of a query that follow no chain of leading rows, itself included."""
    widest: int
    """Queries of one segment at most."""

    def group(self, heads: int) -> int:
        """Neighbouring queries that share keys, for so many query heads on a kv head."""
        rows, power = 1 if self.widest == 1 else 4 if self.widest <= 4 else 8, _power(heads)
        return max(rows * max(1, 8 // power), 16 // power)

    def groups(self, heads: int) -> int:
        """Groups of queries at most."""
        return min(self.queries, self.queries // self.group(heads) + self.segments)

    def supers(self, heads: int, kv_heads: int) -> bool:
        """Whether chunks are folded before they leave the multiprocessor."""
        return self.groups(heads) * kv_heads * -(-self.longest // _SUPER) >= 256

    def slots(self, heads: int, kv_heads: int) -> int:
        """Partial results of a query and head."""
        if self.supers(heads, kv_heads):
            return 2 * (-(-self.longest // _SUPER) + 1)
        return -(-self.longest // _CHUNK) + 1


@dataclass(frozen=True)
class Queries:
    """What `plan.cu` made of a batch: int32, on the device."""

    extent: Extent
    table: Tensor
    """[segments, pages]"""
    segment_of: Tensor
    position_of: Tensor
    slot_of: Tensor
    straight_of: Tensor
    full_of: Tensor
    path: Tensor
    groups: Tensor
    """[groups, 4]: members, first query, `full` and segment."""


class Attention:
    """Plans and attends on one card. Raises ImportError where Triton is missing."""

    def __init__(self, runtime: Runtime) -> None:
        from . import triton_attention

        self._kernels: Any = triton_attention
        self._runtime = runtime
        self._workspaces: list[Tensor] = [torch.empty(0, device=runtime.device)]

    def plan(
        self,
        extent: Extent,
        heads: int,
        row_start: Tensor,
        row_count: Tensor,
        base: Tensor,
        positions: Tensor,
        parents: Tensor,
        page_table: Tensor,
        stored: Tensor | None = None,
    ) -> Queries:
        """heads: query heads on a kv head. The tensors are those of `AttentionMetadata`, on the card."""
        n, groups, width = extent.queries, extent.groups(heads), max(1, extent.deepest)
        held = torch.empty(5 * n + n * width + 4 * groups, dtype=torch.int32, device=base.device)
        grouped, of, path = held.split([4 * groups, 5 * n, n * width])  # groups lie on 16 bytes
        per_query = of.view(5, n).unbind()
        kernel = self._runtime.kernel(_PLAN, "plan_rows", _BLOCK)
        assert kernel is not None
        kernel(
            (extent.segments,), row_start, row_count, base, positions, parents, stored, *per_query, path, grouped,
            extent.segments, n, extent.group(heads), groups, width,
        )  # fmt: skip
        segment_of, position_of, slot_of, straight_of, full_of = per_query
        return Queries(
            extent, page_table, segment_of, position_of, slot_of, straight_of, full_of, path.view(n, width),
            grouped.view(groups, 4),
        )  # fmt: skip

    def attend(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        queries: Queries,
        out: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        tile: int = 0,
    ) -> Tensor:
        """Attention of q [N, Hq, D] over pages [P, page, Hkv, D] and [P, page, Hkv, Dv], contiguous bfloat16.

        out: [N, Hq, Dv]; with `tile`, activations in tiles of so many rows. Options as `backend.Attend` has them.
        """
        if not scale > 0:
            raise ValueError(f"scores are scaled by more than 0, not {scale}")
        extent, (n, heads, width) = queries.extent, q.shape
        page, kv_heads, value_width = *k_pages.shape[1:3], v_pages.shape[3]
        group = heads // kv_heads
        supers = extent.supers(group, kv_heads)
        partial = self._workspace(extent.slots(group, kv_heads) * n * heads, value_width)
        shape = {
            "TILE": _TILE, "CHUNK": _CHUNK, "SUPER": _SUPER,
            "HEADS": heads, "GROUP": group, "KV": kv_heads, "D": width, "DP": _power(width), "V": value_width,
            "VP": _power(value_width), "PAGE": page, "SUPERS": supers, "CAPPED": softcap is not None,
            "WINDOWED": window is not None,
        }  # fmt: skip
        numbers = (scale if softcap is not None else scale * _LOG2_E, softcap or 1.0, window or 0)
        chunks = -(-extent.longest // (_SUPER if supers else _CHUNK))
        if chunks:
            self._kernels.shared_tiles[(len(queries.groups), kv_heads, chunks)](
                q, k_pages, v_pages, queries.table, queries.position_of, queries.groups, *partial, n,
                queries.table.shape[1], *numbers, **shape, GROUPED=_power(group), ROWS=extent.group(group),
                num_warps=4, num_stages=3 if width <= 128 else 2, enable_fp_fusion=False,
            )  # fmt: skip
        self._kernels.own_tiles[(n, kv_heads)](
            q, k_pages, v_pages, queries.table, queries.segment_of, queries.position_of, queries.straight_of,
            queries.full_of, queries.path, *partial, sinks if sinks is not None else q, out, n, queries.table.shape[1],
            queries.path.shape[1], *numbers, **shape, GROUPED=max(8, _power(group)), SINKS=sinks is not None,
            TILED=tile, EIGHTHS=out.shape[1] if tile else 0, num_warps=4, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
        return out

    def _workspace(self, results: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values, largest scores and sums of so many partial results."""
        size = results * (width + 2)
        if size > len(self._workspaces[-1]):  # graphs may still refer to the smaller ones
            self._workspaces.append(torch.empty(size, device=self._runtime.device))
        values, most, total = self._workspaces[-1][:size].split([results * width, results, results])
        return values, most, total


def _power(n: int) -> int:
    """The power of two that holds n, at least 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
