"""Experts of a mixture in one launch each way: rows grouped by the weights that they meet (`src/experts.cu`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compile import Program
from .layout import Weights
from .linear import Linear, activations
from .runtime import Runtime
from .tiling import ROW_TILES, choose

_PROGRAM = Program("experts.cu")
_THREADS, _BLOCK = 1024, 256
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class Grouped:
    """Where rows go that meet different weights: slots in tiles of `tile` rows, each tile of one expert."""

    tile: int
    expert_of: Tensor
    """int32 [tiles], -1 for an empty one"""
    row_of: Tensor
    """int32 [slots], -1 for none"""
    slot_of: Tensor
    """int32 [rows · choices], -1 for none"""


class Grouping:
    """Sorts rows on one card, without a word to the host."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        runtime.programs.start(_PROGRAM)

    def group(self, chosen: Tensor, experts: int, tile: int) -> Grouped:
        """chosen: int32 [rows, choices] of 0 to experts - 1, anything else for none. Raises ValueError."""
        if not 0 < experts <= MOST_EXPERTS:
            raise ValueError(f"{experts} experts: 1 to {MOST_EXPERTS} are possible")
        pairs, each = chosen.numel(), chosen.shape[1]
        tiles = min(pairs, pairs // tile + experts)
        made = [torch.empty(n, dtype=torch.int32, device=chosen.device) for n in (tiles, tiles * tile, pairs)]
        self._launch("plan_experts", (1,), _THREADS, chosen, *made, pairs, each, experts, tile, tiles)
        return Grouped(tile, *made)

    def combine(self, y: Tensor, grouped: Grouped, shares: Tensor, out: Tensor) -> Tensor:
        """out [rows, width] = sum of y [slots, width] float32 over a row's choices times shares [rows, choices].

        The width is a multiple of 4.
        """
        each, quarters = shares.shape[1], y.shape[1] // 4
        count = len(shares) * quarters
        self._launch(
            "combine_rows", (-(-count // _BLOCK),), _BLOCK, y, grouped.slot_of, shares, out, each, quarters, count
        )
        return out

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Tensor | int) -> None:
        kernel = self._runtime.kernel(_PROGRAM, name, threads)
        assert kernel is not None
        kernel(grid, *arguments)


@dataclass(frozen=True)
class ExpertWeights:
    """All experts of a block, `layout.stacked`, gates and ups interleaved (`layout.interleave`)."""

    gate_up: Weights
    down: Weights

    @property
    def count(self) -> int:
        return len(self.down.blobs) // -(-self.down.shape[0] // 64)


class Experts:
    """Mixtures of gated experts on one card. A row's bits depend on the row, its choices and the weights alone."""

    def __init__(self, runtime: Runtime) -> None:
        self._card, self._device = runtime.card, runtime.device
        self._linear, self._grouping = Linear(runtime), Grouping(runtime)

    def __call__(self, weights: ExpertWeights, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x [rows, d] bfloat16, chosen int32 and shares float32 [rows, choices] -> [rows, d] bfloat16.

        Σ over a row's choices of share · down(silu(gate x) · up x), in float32, in the order of the choices.
        """
        pairs, active = chosen.numel(), min(weights.count, chosen.numel())
        tile = next((t for t in ROW_TILES if t * active >= pairs), ROW_TILES[-1 if self._card.hopper else -2])
        grouped = self._grouping.group(chosen, weights.count, tile)
        slots = len(grouped.row_of)
        inner = activations(slots, weights.down.shape[1], tile, self._device)
        packed = self._linear.pack(x, weights.gate_up, grouped.row_of, tile)
        self._multiply(weights.gate_up, packed, grouped, inner, active, gated=True)
        y = torch.empty(slots, weights.down.shape[0], device=self._device)
        self._multiply(weights.down, inner, grouped, y, active)
        return self._grouping.combine(y, grouped, shares, torch.empty_like(x))

    def _multiply(
        self, weights: Weights, packed: Tensor, grouped: Grouped, out: Tensor, active: int, gated: bool = False
    ) -> None:
        outputs = weights.shape[0] * active  # as many tiles as one matrix of all that may be met
        tiling = choose(self._card, weights.layout, outputs, weights.depth_blobs, grouped.tile, gated)
        rows = len(grouped.row_of)
        self._linear.product(weights, packed, rows, out, gated=gated, experts=grouped.expert_of, tiling=tiling)
