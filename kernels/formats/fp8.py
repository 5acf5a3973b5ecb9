"""Eight-bit floats (E4M3, Micikevicius et al., arXiv 2209.05433) under a scale for each block of rows and columns.

As DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) and its followers store them: blocks of 128 × 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, expect, expect_finite, matrix

RUN = 64  # depth that kernels take at once
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8(Format):
    """w = weight · weight_scale_inv, the latter by blocks of `tile` = (rows, columns); the last ones may be smaller.

    weight float8_e4m3fn [out, in]; weight_scale_inv float32 [⌈out / rows⌉, ⌈in / columns⌉].
    """

    tile: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        rows, columns = self.tile
        if rows < 1 or columns < 1 or columns % RUN:
            raise FormatError(f"fp8 weights have blocks of a multiple of {RUN} columns, not of {columns}.")

    @property
    def name(self) -> str:
        return "fp8"

    def quantize(self, weight: Tensor) -> Tensors:
        weight = matrix(weight)
        rows, columns = self.tile
        whole = F.pad(weight, (0, -weight.shape[1] % columns, 0, -len(weight) % rows))
        largest = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax((1, 3))
        scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
        shares = weight / self.spread(scale, (weight.shape[0], weight.shape[1]))
        return {"weight": shares.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), "weight_scale_inv": scale}

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        scales = (-(-shape[0] // self.tile[0]), -(-shape[1] // self.tile[1]))
        wanted = {"weight": (shape, torch.float8_e4m3fn), "weight_scale_inv": (scales, torch.float32)}
        expect(tensors, wanted, self.name)
        expect_finite(tensors, ("weight_scale_inv",), self.name)
        if bool((tensors["weight"].view(torch.uint8) & 0x7F == 0x7F).any()):
            raise FormatError("weight of fp8 weights holds a value that is not finite.")

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        return tensors["weight"].to(dtype) * self.spread(tensors["weight_scale_inv"].to(dtype), shape)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        raise FormatError("rows of fp8 weights share scales: an embedding cannot be stored so.")

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] + 4 * -(-shape[0] // self.tile[0]) * -(-shape[1] // self.tile[1])

    def spread(self, scales: Tensor, shape: Shape, columns: int = 1) -> Tensor:
        """Scales of blocks -> those of each row and of each `columns` neighbours: [out, ⌈in / columns⌉]."""
        rows = scales.repeat_interleave(self.tile[0], 0)[: shape[0]]
        return rows.repeat_interleave(self.tile[1] // columns, 1)[:, : -(-shape[1] // columns)]
