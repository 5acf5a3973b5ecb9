"""The small operations between products on a card: `src/elementwise.cu`. All tensors are contiguous bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Queries
from .compile import Program
from .driver import Kernel
from .runtime import Runtime

_PROGRAM = Program("elementwise.cu")
_BLOCK = 256
MOST_NORMED = _BLOCK * 8 * 8  # values of a row that a block keeps in registers


class Elementwise:
    """Norms, rotations, gates and stores on one card."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        runtime.programs.start(_PROGRAM)

    def norm(
        self,
        h: Tensor,
        weight: Tensor,
        epsilon: float,
        out: Tensor,
        *,
        add: Tensor | None = None,
        tile: int = 0,
        overlap: bool = False,
    ) -> Tensor:
        """h [n, width] += add; out = weight · h / sqrt(mean(h²) + epsilon), as rows or, with `tile`, activations.

        weight: [width] float32. Raises ValueError for a width that is no multiple of 8 or above 16,384.
        """
        rows, width = h.shape
        if width % 8 or width > MOST_NORMED:
            raise ValueError(f"rows of {width} values are not normed: a multiple of 8 to {MOST_NORMED} is")
        padded = out.shape[1] if tile else 0
        self._launch(
            "norm_rows", (rows,), h, add, weight, out, width // 8, padded, tile, float(epsilon), overlap=overlap
        )
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn heads x [n, heads, width] in place by angles, float32 [n, width]. The width is a multiple of 4."""
        rows, heads, width = x.shape
        count = rows * heads * width // 4
        self._launch("rotate", (-(-count // _BLOCK),), x, cos, sin, heads, width, count)
        return x

    def store(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, queries: Queries) -> None:
        """New keys and values [n, kv heads, width] into their slots; kv heads · width are multiples of 8."""
        self._launch(
            "store_rows", (len(k),), k, v, k_pages, v_pages, queries.segment_of, queries.slot_of, queries.table,
            queries.table.shape[1], k_pages.shape[1], len(k_pages), k[0].numel() // 8, v[0].numel() // 8,
        )  # fmt: skip

    def rotate_and_store(
        self,
        qkv: Tensor,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        cos: Tensor,
        sin: Tensor,
        queries: Queries,
        overlap: bool = False,
    ) -> Tensor:
        """qkv [n, heads + 2 kv heads, width]: q [n, heads, width] turned; keys turned and values into their slots."""
        rows, heads, width = q.shape
        page, kv_heads = k_pages.shape[1:3]
        threads = (heads + 2 * kv_heads) * width // 4
        self._launch(
            "rotate_and_store", (rows, -(-threads // _BLOCK)), qkv, q, k_pages, v_pages, cos, sin, queries.segment_of,
            queries.slot_of, queries.table, queries.table.shape[1], page, len(k_pages), heads, kv_heads, width,
            overlap=overlap,
        )  # fmt: skip
        return q

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up, of one shape with an even number of values."""
        out = torch.empty_like(gate)
        count = out.numel() // 2
        self._launch("gate_rows", (-(-count // _BLOCK),), gate, up, out, count)
        return out

    def add(self, h: Tensor, add: Tensor, overlap: bool = False) -> Tensor:
        """h += add, of one shape with an even number of values."""
        count = h.numel() // 2
        self._launch("add_rows", (-(-count // _BLOCK),), h, add, count, overlap=overlap)
        return h

    def _launch(
        self, name: str, grid: tuple[int, ...], *arguments: Tensor | int | float | None, overlap: bool = False
    ) -> None:
        kernel: Kernel | None = self._runtime.kernel(_PROGRAM, name, _BLOCK)
        assert kernel is not None
        kernel(grid, *arguments, overlap=overlap)
