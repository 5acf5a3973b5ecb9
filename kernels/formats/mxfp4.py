"""MXFP4 (OCP Microscaling Formats 1.0, section 5.3): four-bit floats under a power of two for 32 neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, by_pieces, expect, matrix
from .nibbles import pair, split

BLOCK = 32
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits: two of exponent, one of mantissa (E2M1)
_BIAS, _NONE = 127, 255  # of the scales' exponents; what is no number
_LARGEST = 2  # exponent of the highest level


@dataclass(frozen=True)
class Mxfp4(Format):
    """w = ±LEVELS[code & 7] · 2^(scale - 127), bit 3 of a code its sign, by blocks of 32 neighbours in a row.

    blocks uint8 [out, in / 32, 16], two codes a byte, even places low; scales uint8 [out, in / 32], below 255.
    """

    block: int = BLOCK

    @property
    def name(self) -> str:
        return "mxfp4"

    def quantize(self, weight: Tensor) -> Tensors:
        weight = matrix(weight)
        self._check_width(weight.shape[1])
        levels = torch.tensor(LEVELS, device=weight.device)

        def quantize(rows: Tensor) -> Tensors:
            groups = rows.unflatten(1, (-1, BLOCK))
            exponent = torch.frexp(groups.abs().amax(-1)).exponent - 1 - _LARGEST
            exponent = exponent.clamp(-_BIAS, _NONE - 1 - _BIAS)
            shares = torch.ldexp(groups.double(), -exponent[..., None]).float().clamp(-LEVELS[-1], LEVELS[-1])
            codes = torch.bucketize(shares.abs(), (levels[:-1] + levels[1:]) / 2, out_int32=True)
            codes = (codes | (shares < 0).int() << 3).to(torch.uint8)
            return {"blocks": pair(codes), "scales": (exponent + _BIAS).to(torch.uint8)}

        return by_pieces(weight, quantize)

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        out, width = shape
        self._check_width(width)
        wanted = {
            "blocks": ((out, width // BLOCK, BLOCK // 2), torch.uint8),
            "scales": ((out, width // BLOCK), torch.uint8),
        }
        expect(tensors, wanted, self.name)
        if int(tensors["scales"].max()) == _NONE:
            raise FormatError("a scale of mxfp4 weights is 255, which stands for no number.")

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        codes = split(tensors["blocks"]).long()
        levels = torch.tensor(LEVELS, dtype=dtype, device=codes.device)
        values = levels[codes & 7] * (1 - 2 * (codes >> 3)).to(dtype)
        return (values * scales_of(tensors).to(dtype)[..., None]).view(shape)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {name: t[which] for name, t in tensors.items()}

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] // BLOCK * (BLOCK // 2 + 1)

    def _check_width(self, width: int) -> None:
        if width % BLOCK:
            raise FormatError(f"mxfp4 weights have rows of a multiple of {BLOCK} columns, not {width}.")


def scales_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Powers of two [out, in / 32] in float64."""
    exponents = tensors["scales"].int() - _BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents)
