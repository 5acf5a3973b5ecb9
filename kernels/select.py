"""Which function multiplies by weights of a format: a table whose last row can do everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats.base import Format

if TYPE_CHECKING:
    from .quantized import QuantizedLinear

TILE = 16  # rows of one product in torch


class Multiply(Protocol):
    """rows [n, in] -> [n, out] float32."""

    def __call__(self, layer: QuantizedLinear, rows: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Kernel:
    """One row of the table: `suits` says for which format, device type and number of rows it is."""

    name: str
    suits: Callable[[Format, str, int], bool]
    run: Multiply


def dequantize_then_multiply(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """On a CPU every product has TILE rows, so that a row's bits do not depend on their number."""
    weight = layer.dense().bfloat16()
    if rows.device.type != "cpu":
        return F.linear(rows.bfloat16(), weight).float() + layer.bias
    rows, weight = rows.bfloat16().float(), weight.float().T
    y = rows.new_empty(len(rows), layer.out_features)
    for out, part in zip(y.split(TILE), rows.split(TILE), strict=True):
        tile = F.pad(part, (0, 0, 0, TILE - len(part)))
        out.copy_((torch.matmul(tile, weight) + layer.bias)[: len(part)])
    return y


KERNELS: tuple[Kernel, ...] = (Kernel("dequantize", lambda format, device, rows: True, dequantize_then_multiply),)


def select(format: Format, device: torch.device, rows: int) -> Kernel:
    """The first row of the table that suits."""
    return next(kernel for kernel in KERNELS if kernel.suits(format, device.type, rows))
