"""Products with packed weights. A row's bits depend on the row and the weights alone (`src/linear.cu`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats.base import padded
from ..formats.nf4 import LEVELS
from .blobs import UNIT, Layout
from .compile import Program
from .driver import Kernel
from .layout import Weights
from .nvrtc import NvrtcError
from .runtime import Runtime
from .tiling import ROWS, Tiling, choose, row_tile

_ELEMENTWISE = Program("elementwise.cu")
_BLOCK = 256
_MOST_PLACES = 1 << 16
_TWINS = ("Int4", "Nf4")  # what `triton_linear.py` can read


def activations(rows: int, width: int, tile: int, device: torch.device) -> Tensor:
    """A zeroed buffer for `rows` rows in tiles of `tile`: [tiles, padded width / 8, tile, 8] bfloat16."""
    return torch.zeros(-(-rows // tile), padded(width, UNIT) // 8, tile, 8, dtype=torch.bfloat16, device=device)


class Linear:
    """Products on one card."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._card = runtime.card
        self._partials = [torch.empty(0, dtype=torch.uint8, device=runtime.device)]
        self._levels: Tensor | None = None
        self._patient = False
        self._arrived = torch.zeros(_MOST_PLACES, dtype=torch.int32, device=runtime.device)

    def tiling(self, weights: Weights, rows: int, gated: bool = False) -> Tiling:
        """How a product of so many rows is cut."""
        return choose(self._card, weights.layout, weights.shape[0], weights.depth_blobs, rows, gated)

    def prepare(self, weights: Weights, gated: bool = False) -> None:
        """Begins to compile what products of all numbers of rows need, side by side."""
        for rows in ROWS:
            self._runtime.programs.start(self.tiling(weights, rows, gated).program(self._card, weights.layout))

    def pack(self, x: Tensor, weights: Weights, sources: Tensor | None = None, tile: int = 0) -> Tensor:
        """x [rows, in] bfloat16, contiguous -> activations for these weights, in tiles of `tile` rows if that is given.

        sources: int32 [n], the row of x that each is, below 0 for none; all rows in their order by default.
        """
        rows, width = x.shape if sources is None else (len(sources), x.shape[1])
        tile = tile or row_tile(rows, self._card)
        packed = torch.empty(-(-rows // tile), weights.depth_blobs * 8, tile, 8, dtype=torch.bfloat16, device=x.device)
        kernel = self._kernel(_ELEMENTWISE, "pack_rows", _BLOCK)
        eighths = packed.shape[1]
        count = len(packed) * tile * eighths
        kernel(
            (-(-count // _BLOCK),), x, packed, sources, weights.columns, rows, width, eighths, tile,
            int(weights.layout.reordered), count,
        )  # fmt: skip
        return packed

    def product(
        self,
        weights: Weights,
        packed: Tensor,
        rows: int,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        experts: Tensor | None = None,
        tiling: Tiling | None = None,
        overlap: bool = False,
        wait: bool = True,
    ) -> None:
        """out = packed · Wᵀ + bias.

        packed: activations of `rows` rows (`pack`). out: [rows, out] bfloat16 or float32; if gated, for weights that
        `interleave` made, activations of silu(gate) · up, whose padding stays as it is. bias: [out] float32, not if
        gated. experts: int32 [tiles of rows], which of `stacked` weights a tile meets, below 0 for none.
        overlap: it may start while the kernel before it ends. wait: for the compiler, rather than let Triton compute
        the same meanwhile. Raises NvrtcError where nothing can be compiled and Triton has no twin.
        """
        tiling = tiling or self.tiling(weights, rows, gated)
        tiling = replace(tiling, experts=experts is not None, wide=out.dtype == torch.float32)
        layout, outputs = weights.layout, weights.shape[0]
        if tuple(packed.shape[1:]) != (weights.depth_blobs * 8, tiling.rows, 8):
            raise ValueError(f"activations {tuple(packed.shape)} are not those of {rows} rows for {weights.shape}")
        program = tiling.program(self._card, layout)
        if weights.extension is not None:
            self._extend(weights, packed, rows, overlap)
        twin = (
            layout.name in _TWINS and not gated and experts is None and importlib.util.find_spec("triton") is not None
        )
        kernel = self._compiled(program, tiling, layout, wait, twin)
        if kernel is None:
            self._twin(weights, packed, rows, out, bias)
            return
        tiles = tiling.tiles(outputs, rows)
        partial = self._workspace(tiling.partial_bytes(outputs, rows))
        kernel(
            (min(tiles, tiling.resident * self._card.multiprocessors),),
            weights.blobs, packed, out, partial, self._arrived, weights.scale, bias, weights.codebooks, experts,
            rows, outputs, weights.depth_blobs, tiles, -(-rows // tiling.rows),
            overlap=overlap,
        )  # fmt: skip

    def _compiled(self, program: Program, tiling: Tiling, layout: Layout, wait: bool, twin: bool) -> Kernel | None:
        """None where the twin in Triton is to compute."""
        wait = wait or self._patient or not twin
        try:
            return self._runtime.kernel(program, "linear", tiling.threads, tiling.shared_bytes(layout), wait=wait)
        except NvrtcError:
            if twin:
                return None
            raise

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, products wait for the compiler: what is captured there stays."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _twin(self, weights: Weights, packed: Tensor, rows: int, out: Tensor, bias: Tensor | None) -> None:
        """The same product to the bit, in Triton."""
        from . import triton_linear

        if self._levels is None:
            self._levels = torch.tensor(LEVELS).bfloat16().to(out.device)
        tiles, _, tile, _ = packed.shape
        kernel: Any = triton_linear.linear
        kernel[(len(weights.blobs), tiles)](
            weights.blobs.view(torch.int32), packed, self._levels if bias is None else bias, self._levels, out, rows,
            weights.shape[0], weights.depth_blobs, TILE=tile, LINES=max(tile, 16), NF4=weights.layout.name == "Nf4",
            BIASED=bias is not None, DTYPE=_triton_dtype(packed.dtype), num_warps=4, num_stages=3,
            enable_fp_fusion=False,
        )  # fmt: skip

    def _extend(self, weights: Weights, packed: Tensor, rows: int, overlap: bool) -> None:
        """Columns of outliers come once more: other weights that read the same activations write theirs later."""
        assert weights.extension is not None
        columns, factors = weights.extension.columns, weights.extension.factors
        count, (_, eighths, tile, _) = rows * len(columns), packed.shape
        self._kernel(_ELEMENTWISE, "extend_rows", _BLOCK)(
            (-(-count // _BLOCK),), packed, columns, factors, rows, len(columns), weights.shape[1], eighths, tile,
            overlap=overlap,
        )  # fmt: skip

    def _workspace(self, size: int) -> Tensor:
        """Memory for the sums of quarters: kernels of one stream follow each other in it."""
        if size > len(self._partials[-1]):  # graphs may still refer to the smaller ones
            self._partials.append(torch.empty(size, dtype=torch.uint8, device=self._runtime.device))
        return self._partials[-1]

    def _kernel(self, program: Program, name: str, threads: int, shared: int = 0) -> Kernel:
        kernel = self._runtime.kernel(program, name, threads, shared)
        assert kernel is not None
        return kernel


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def quarter_sums(x: Tensor, weight: Tensor) -> Tensor:
    """The same sum in torch: x [rows, in], weight [out, in] -> [rows, out] float32, by the quarters of `linear.cu`."""
    quarter = padded(x.shape[1], UNIT) // 4
    parts = [a.float() @ b.float().T for a, b in zip(x.split(quarter, 1), weight.split(quarter, 1), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
