"""A block of the Llama kind on a card: ten launches, all of them overlapping but those of attention.

Norm, attention, norm, gated MLP (arXiv 2307.09288); queries, keys and values are one product, gate and up another,
which leaves silu(gate) · up in its epilogue. Activations go from kernel to kernel in the layout that products read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import FormatError
from .attention import Attention, Queries
from .elementwise import Elementwise
from .layout import Weights
from .linear import Linear, activations
from .runtime import Runtime
from .tiling import row_tile


@dataclass(frozen=True)
class BlockWeights:
    """One block's matrices and norms [d] float32."""

    norm: Tensor
    qkv: Weights
    """Outputs: query heads, key heads, value heads."""
    out: Weights
    between: Tensor
    gate_up: Weights
    """As `layout.interleave` makes them."""
    down: Weights
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises FormatError for weights that read activations in an order that no kernel of a block writes."""
        if not all(weights.plain for weights in (self.qkv, self.out, self.gate_up, self.down)):
            raise FormatError("codebooks and an order of columns want activations of their own.")


@dataclass(frozen=True)
class BlockShape:
    """What all blocks of a span have in common."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float


class Buffers:
    """What blocks write between products, for up to so many rows: made once, so that graphs may keep addresses."""

    def __init__(self, shape: BlockShape, rows: int, tile: int, device: torch.device) -> None:
        def of(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.bfloat16, device=device)

        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_width
        self.tile = tile
        self.normed = activations(rows, shape.width, tile, device)
        self.qkv = of(rows, shape.heads + 2 * shape.kv_heads, shape.head_width)
        assert self.qkv[0].numel() == outputs
        self.queries = of(rows, shape.heads, shape.head_width)
        self.seen = activations(rows, shape.heads * shape.head_width, tile, device)
        self.attended, self.fed = of(rows, shape.width), of(rows, shape.width)
        self.gated = activations(rows, shape.inner, tile, device)


class Block:
    """Runs blocks of one shape on one card."""

    def __init__(self, runtime: Runtime, shape: BlockShape) -> None:
        self.shape, self._runtime = shape, runtime
        self._linear, self._attention, self._small = Linear(runtime), Attention(runtime), Elementwise(runtime)

    def buffers(self, rows: int) -> Buffers:
        """For batches of so many rows."""
        return Buffers(self.shape, rows, row_tile(rows, self._runtime.card), self._runtime.device)

    def __call__(
        self,
        weights: BlockWeights,
        h: Tensor,
        add: Tensor | None,
        pages: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        queries: Queries,
        buffers: Buffers,
        window: int | None = None,
    ) -> Tensor:
        """h [n, d] bfloat16 in place: += add, then += attention; returns what the MLP adds, for the next block to add.

        pages: keys and values [P, page, kv heads, width] bfloat16. angles: cos and sin, float32 [n, width].
        """
        b, s, rows = buffers, self.shape, len(h)
        self._small.norm(h, weights.norm, s.epsilon, b.normed, add=add, tile=b.tile, overlap=True)
        self._linear.product(weights.qkv, b.normed, rows, b.qkv, bias=weights.qkv_bias, overlap=True)
        self._small.rotate_and_store(b.qkv, b.queries, *pages, *angles, queries, overlap=True)
        self._attention.attend(b.queries, *pages, queries, b.seen, scale=s.head_width**-0.5, window=window, tile=b.tile)
        self._linear.product(weights.out, b.seen, rows, b.attended, bias=weights.out_bias, overlap=True)
        self._small.norm(h, weights.between, s.epsilon, b.normed, add=b.attended, tile=b.tile, overlap=True)
        self._linear.product(weights.gate_up, b.normed, rows, b.gated, gated=True, overlap=True)
        self._linear.product(weights.down, b.gated, rows, b.fed, bias=weights.down_bias, overlap=True)
        return b.fed
