"""NF4 with double quantization, byte for byte as bitsandbytes stores it (QLoRA, Dettmers et al., arXiv 2305.14314).

A matrix is one flat row of blocks of 64, each with a scale; the scales, less their mean, are 8-bit codes in blocks of
256. Where `in` is no multiple of 64 blocks go on from row to row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, by_pieces, expect, expect_finite, matrix, padded

BLOCK, NESTED = 64, 256
_TINY = 1e-38
_ZERO = 7  # the code of level 0
# Quantiles of the normal distribution: the published constants (QLoRA, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Nf4(Format):
    """w = LEVELS[code] · (nested_quant_map[absmax] · nested_absmax + offset), the latter by block.

    weight uint8 [⌈out · in / 2⌉, 1], two codes a byte, even places high; absmax uint8 [blocks];
    nested_absmax float32 [⌈blocks / 256⌉]; nested_quant_map float32 [256]; offset float32 [1]. Without double
    quantization absmax is float32 and the latter three are missing.
    """

    nested: bool = True

    @property
    def name(self) -> str:
        return "nf4"

    def quantize(self, weight: Tensor) -> Tensors:
        flat = matrix(weight).flatten()
        levels = torch.tensor(LEVELS, device=flat.device)

        def quantize(column: Tensor) -> Tensors:
            absmax, scaled = _blocks(column[:, 0], BLOCK)
            return {"absmax": absmax, "codes": _nearest(scaled, levels)}

        absmax, codes = by_pieces(flat[:, None], quantize).values()
        weight = pair_high(F.pad(codes, (0, len(codes) % 2), value=_ZERO))[:, None]
        if not self.nested:
            return {"weight": weight, "absmax": absmax}
        offset = absmax.mean()
        nested_map = dynamic_map().to(flat.device, copy=True)
        nested, shares = _blocks(absmax - offset, NESTED)
        return {
            "weight": weight,
            "absmax": _nearest(shares, nested_map),
            "nested_absmax": nested,
            "nested_quant_map": nested_map,
            "offset": offset[None],
        }

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        values = shape[0] * shape[1]
        blocks = -(-values // BLOCK)
        wanted = {
            "weight": ((-(-values // 2), 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8 if self.nested else torch.float32),
        }
        if self.nested:
            wanted["nested_absmax"] = ((-(-blocks // NESTED),), torch.float32)
            wanted["nested_quant_map"] = ((256,), torch.float32)
            wanted["offset"] = ((1,), torch.float32)
        expect(tensors, wanted, self.name)
        expect_finite(tensors, tuple(name for name in wanted if tensors[name].is_floating_point()), self.name)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        codes = split_high(tensors["weight"][:, 0])[: shape[0] * shape[1]].long()
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device).to(dtype)
        scales = block_scales(tensors, dtype).repeat_interleave(BLOCK)[: len(codes)]
        return (levels[codes] * scales).view(shape)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        raise FormatError("rows of nf4 weights share blocks: an embedding cannot be stored so.")

    def nbytes(self, shape: Shape) -> int:
        values = shape[0] * shape[1]
        blocks = padded(values, BLOCK) // BLOCK
        groups = padded(values, BLOCK * NESTED) // (BLOCK * NESTED)
        return (values + 1) // 2 + (blocks + 4 * (groups + 257) if self.nested else 4 * blocks)


def block_scales(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[blocks] in `dtype` of a checkpoint's tensors."""
    if tensors["absmax"].is_floating_point():
        return tensors["absmax"].to(dtype)
    shares = tensors["nested_quant_map"].to(dtype)[tensors["absmax"].flatten().long()]
    nested = tensors["nested_absmax"].to(dtype).repeat_interleave(NESTED)[: len(shares)]
    return shares * nested + tensors["offset"].to(dtype)


def pair_high(codes: Tensor) -> Tensor:
    """uint8 [2n] below 16 -> [n], even places in the high halves."""
    return codes[0::2] << 4 | codes[1::2]


def split_high(pairs: Tensor) -> Tensor:
    """What `pair_high` was given."""
    return torch.stack((pairs >> 4, pairs & 15), -1).flatten()


@functools.cache
def dynamic_map() -> Tensor:
    """bitsandbytes' 8-bit code for scales, float32 [256]: a sign, an exponent of tens, and a fraction.

    (Dettmers et al., arXiv 2110.02861, section 2.1: exponent and fraction share seven bits.)
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += [sign * value for sign in (1, -1) for value in (10.0 ** (exponent - 6) * middles).tolist()]
    return torch.tensor(sorted(values))


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each block of [n] values, and the values as shares of it."""
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    shares = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp(-1, 1)
    return absmax, shares.flatten()[: len(flat)]


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Indices, uint8, of the rising `levels` nearest to `values`."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
