"""Which function multiplies by weights of a format: a table whose last row can do everything.

`select` is a pure function of what is asked and of what the machine can do, which a `Device` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats.base import Format
from .quantized_native import decodes, multiply

if TYPE_CHECKING:
    from .quantized import QuantizedLinear

TILE = 16  # rows of one product in torch


class Multiply(Protocol):
    """rows [n, in] -> [n, out] float32."""

    def __call__(self, layer: QuantizedLinear, rows: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Device:
    """What computes: a type of torch's, and whether the C kernels could be built for it."""

    type: str
    native: bool = False


@dataclass(frozen=True)
class Kernel:
    """One row of the table: for which formats, devices and numbers of rows it is, and what runs."""

    name: str
    suits: Callable[[Format, Device, int], bool]
    run: Multiply


def dequantize_then_multiply(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """On a CPU every product has TILE rows, so that a row's bits do not depend on their number."""
    weight = layer.dense().bfloat16()
    if rows.device.type != "cpu":
        return F.linear(rows.bfloat16(), weight).float() + layer.bias[: layer.out_features]
    rows, weight, bias = rows.bfloat16().float(), weight.float().T, layer.bias[: layer.out_features]
    y = rows.new_empty(len(rows), layer.out_features)
    for out, part in zip(y.split(TILE), rows.split(TILE), strict=True):
        tile = F.pad(part, (0, 0, 0, TILE - len(part)))
        out.copy_((torch.matmul(tile, weight) + bias)[: len(part)])
    return y


KERNELS: tuple[Kernel, ...] = (
    Kernel("native", lambda format, device, rows: device.native and decodes(format), multiply),
    Kernel("dequantize", lambda format, device, rows: True, dequantize_then_multiply),
)


def select(format: Format, device: Device, rows: int) -> Kernel:
    """The first row of the table that suits."""
    return next(kernel for kernel in KERNELS if kernel.suits(format, device, rows))
