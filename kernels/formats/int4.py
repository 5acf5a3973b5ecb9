"""Groupwise int4 with scale and zero, at the granularity that a matrix needs (FineQuant, arXiv 2308.09723).

GLM-130B's symmetric row-wise int4 (arXiv 2210.02414) is the case of one group a row and the zero at 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, by_pieces, expect, expect_finite, matrix, padded
from .nibbles import pair, split

ROW = 0  # the group size that is the whole row
RUN = 64  # depth that kernels take at once
_FINEST, _COARSEST = 64, 256
_GAIN = 0.92  # halving a group is worth its scales where the mean range shrinks below this share
_TINY = torch.finfo(torch.float16).tiny


@dataclass(frozen=True)
class Int4(Format):
    """w = scales · (codes - zeros), by groups of neighbours in a row; rows are padded to whole groups and runs of 64.

    codes uint8 [out, depth / 2], two a byte, even depths low; scales float16 and zeros uint8 (0 to 15) [out, groups].
    So the tensors tell the size of their groups, depth / groups.
    """

    group: int | None = 64
    """32, a multiple of 64, or ROW; None to choose 64, 128 or 256 by the weights."""
    symmetric: bool = False
    """The zero is 8 everywhere."""

    def __post_init__(self) -> None:
        if self.group not in (None, 32) and (self.group < 0 or self.group % RUN):
            raise FormatError(f"a group of int4 weights is 32 deep, a multiple of {RUN}, or a row, not {self.group}.")

    @property
    def name(self) -> str:
        return "int4"

    def quantize(self, weight: Tensor) -> Tensors:
        weight = matrix(weight)
        group = choose_group(weight) if self.group is None else self.group

        def quantize(rows: Tensor) -> Tensors:
            groups = self.grouped(rows, group)
            scales, zeros = self.grid(groups)
            return assemble(nearest(groups, scales, zeros), scales, zeros)

        return by_pieces(weight, quantize)

    def grouped(self, weight: Tensor, group: int) -> Tensor:
        """[out, in] -> [out, groups, group], zeros past `in`."""
        group = group or padded(weight.shape[1], RUN)
        depth = padded(weight.shape[1], max(RUN, group))
        return F.pad(weight, (0, depth - weight.shape[1])).unflatten(1, (-1, group))

    def grid(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, float16 and uint8 [...], that span float32 groups [..., group]."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if self.symmetric:
            return torch.maximum(-low / 8, high / 7).half(), torch.full_like(low, 8, dtype=torch.uint8)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float().clamp(min=_TINY)).round().clamp(0, 15)
        return scales, zeros.to(torch.uint8)

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        out, width = shape
        groups = tensors["scales"].shape[-1] if "scales" in tensors and tensors["scales"].dim() else 0
        depth = 2 * tensors["codes"].shape[-1] if "codes" in tensors and tensors["codes"].dim() else 0
        group = depth // max(1, groups)
        fits = groups and group * groups == depth and (group == 32 or group % RUN == 0)
        if not fits or depth != padded(width, max(RUN, group)):
            raise FormatError(
                f"int4 weights of {width} columns have codes of depth {depth} in {groups} groups: whole groups of 32 "
                f"or a multiple of {RUN} must cover {width} columns."
            )
        wanted = {
            "codes": ((out, depth // 2), torch.uint8),
            "scales": ((out, groups), torch.float16),
            "zeros": ((out, groups), torch.uint8),
        }
        expect(tensors, wanted, self.name)
        expect_finite(tensors, ("scales",), self.name)
        if int(tensors["zeros"].max()) > 15:
            raise FormatError(f"a zero of int4 weights is {int(tensors['zeros'].max())}, 0 to 15 are possible.")

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        scales, zeros = (tensors[name].to(dtype)[..., None] for name in ("scales", "zeros"))
        codes = split(tensors["codes"]).unflatten(1, (scales.shape[1], -1))
        return ((codes.to(dtype) - zeros) * scales).flatten(1)[:, : shape[1]]

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {name: t[which] for name, t in tensors.items()}

    def nbytes(self, shape: Shape) -> int:
        group = self.group or (padded(shape[1], RUN) if self.group == ROW else _FINEST)
        depth = padded(shape[1], max(RUN, group))
        return shape[0] * (depth // 2 + 3 * (depth // group))


def nearest(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes, uint8 of 0 to 15, of float32 [..., group] on the grids of scales and zeros [...]."""
    step = scales.float().clamp(min=_TINY)[..., None]
    return (groups / step + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)


def assemble(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    """A checkpoint's tensors of codes [out, groups, group], scales and zeros [out, groups], whoever chose them."""
    return {"codes": pair(codes.flatten(1)), "scales": scales.half(), "zeros": zeros.to(torch.uint8)}


def choose_group(weight: Tensor) -> int:
    """FineQuant's heuristic: halve the groups while that narrows their ranges clearly."""
    group = _COARSEST
    while group > _FINEST and _mean_range(weight, group // 2) < _GAIN * _mean_range(weight, group):
        group //= 2
    return group


def _mean_range(weight: Tensor, group: int) -> float:
    rest = -weight.shape[1] % group
    groups = F.pad(weight, (0, rest)).unflatten(1, (-1, group))
    return float((groups.amax(-1) - groups.amin(-1)).mean())
