"""Which function multiplies by weights of a format: a table whose last row can do everything.

`select` is a pure function of what is asked and of what the machine can do, which a `Device` says.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.base import Format
from . import build as native
from .linear import PackedLinear
from .quantized import decodes, multiply

if TYPE_CHECKING:
    from ..quantized import QuantizedLinear


log = logging.getLogger(__name__)


class Multiply(Protocol):
    """x [..., in] -> [..., out] float32."""

    def __call__(self, layer: QuantizedLinear, x: Tensor, /) -> Tensor: ...


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


def dequantize_then_multiply(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """On a CPU by the dense layer, so that a row's bits do not depend on the others."""
    bias = layer.bias[: layer.out_features]
    if x.device.type == "cpu":
        return PackedLinear(layer.dense(), bias, torch.bfloat16)(x.float())
    # As a matrix: of strided rows in more dimensions torch makes other products, with other bits.
    y = F.linear(x.reshape(-1, layer.in_features), layer.dense().to(x.dtype)).float() + bias
    return y.view(*x.shape[:-1], layer.out_features)


KERNELS: tuple[Kernel, ...] = (
    Kernel("native", lambda format, device, rows: device.native and decodes(format), multiply),
    Kernel("dequantize", lambda format, device, rows: True, dequantize_then_multiply),
)


@functools.cache
def device_of(type: str) -> Device:
    """What this process can do on a device of the type; what it cannot is said once."""
    if type != "cpu":
        log.warning("weights are dequantized before each product on %s: there are no kernels for it yet", type)
    return Device(type, type == "cpu" and native.library() is not None)


@functools.lru_cache(1024)
def select(format: Format, device: Device, rows: int) -> Kernel:
    """The first row of the table that suits."""
    return next(kernel for kernel in KERNELS if kernel.suits(format, device, rows))
