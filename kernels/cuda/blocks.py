"""A span's blocks of the Llama kind, computed whole: each takes ten launches instead of one or two a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import Attend
from ..formats.base import FormatError
from ..llama import LlamaParts
from .block import Block, BlockShape, BlockWeights
from .elementwise import Elementwise
from .norm import RMSNorm
from .runtime import Runtime
from .storage import CudaAttend
from .weights import CudaLinear, Held, beside, interleaved


class NotWhole(ValueError):
    """Why blocks go part by part."""


class CudaBlocks:
    """See `backend.Blocks`. Products of the same rows become one, block by block: never is more than one held twice."""

    def __init__(self, runtime: Runtime, parts: Sequence[LlamaParts]) -> None:
        """Raises NotWhole, where some parts may have been joined; they work on."""
        shapes = {shape_of(part) for part in parts}
        if len(shapes) != 1:
            raise NotWhole("blocks have different shapes")
        self._block, self._small = Block(runtime, shapes.pop()), Elementwise(runtime)
        try:
            self._weights = [weights_of(part) for part in parts]
        except FormatError as error:
            raise NotWhole(str(error)) from error

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, layers: range) -> Tensor:
        """See `backend.Blocks`."""
        assert isinstance(attend, CudaAttend)
        block, shape = self._block, self._block.shape
        h, buffers, add = x.to(torch.bfloat16, copy=True), block.buffers(len(x)), None
        for layer in layers:
            queries = attend.queries(layer, shape.heads // shape.kv_heads)
            add = block(
                self._weights[layer], h, add, attend.pages(layer), angles, queries, buffers, attend.window(layer)
            )
        return h if add is None else self._small.add(h, add, overlap=True)


def shape_of(part: LlamaParts) -> BlockShape:
    """What the kernels must know. Raises NotWhole for what they cannot do."""
    handles = (part.query, part.key, part.value, part.out, part.gate, part.up, part.down)
    if any(not isinstance(handle, CudaLinear) or handle.adapter is not None for handle in handles):
        raise NotWhole("a product is not the card's own")
    norms = (part.before, part.between)
    if any(not isinstance(norm, RMSNorm) or not norm.plain for norm in norms) or part.query_norm is not None:
        raise NotWhole("a norm is not the card's own")
    query, key, inner = part.query.out_features, part.key.out_features, part.gate.out_features
    if part.width % 4 or inner % 32 or part.scale != part.width**-0.5 or part.before.epsilon != part.between.epsilon:
        raise NotWhole("heads, the inner width or a scale are unusual")
    return BlockShape(
        part.query.in_features, inner, query // part.width, key // part.width, part.width, part.before.epsilon
    )


def weights_of(part: LlamaParts) -> BlockWeights:
    """A block's matrices, joined. Raises FormatError where they cannot be."""
    out, down = _alone(part.out), _alone(part.down)
    qkv = beside((part.query, part.key, part.value))
    return BlockWeights(
        part.before.scale,
        qkv.weights,
        out.weights,
        part.between.scale,
        interleaved(part.gate, part.up),
        down.weights,
        qkv.bias,
        out.bias,
        down.bias,
    )


def _alone(handle: CudaLinear) -> Held:
    held = handle.held
    if held.weights.extension is not None:
        raise FormatError("outlier columns want activations of their own.")
    return held
