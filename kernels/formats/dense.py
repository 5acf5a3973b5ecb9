"""Dense weights in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, Shape, Tensors, expect, matrix


@dataclass(frozen=True)
class Dense(Format):
    """`weight` [out, in] in one dtype."""

    label: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.label

    def quantize(self, weight: Tensor) -> Tensors:
        return {"weight": matrix(weight).to(self.dtype)}

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        expect(tensors, {"weight": (shape, self.dtype)}, self.name)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        return tensors["weight"].to(dtype)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {"weight": tensors["weight"][which]}

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] * self.dtype.itemsize
