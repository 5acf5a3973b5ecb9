"""Activations between a device and the wire: float32, bf16, or int8 with one scale per row and 64 channels.

The wire's own page is `protocol/wire/codec.py`, for machines without torch; tests hold that both make the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
_NOT_FINITE = "activations hold a value that is not finite"


class ActivationError(ValueError):
    """Bytes that are no activations of the stated shape."""


def encode(codec: str, rows: Tensor) -> memoryview:
    """[n, width] on any device -> its bytes, in host memory; float32 rows on a CPU are not copied.

    codec: "float32", "bf16" or "int8".
    """
    array: Any = encoded(codec, rows).cpu().numpy()
    return memoryview(array).cast("B")


def encoded(codec: str, rows: Tensor) -> Tensor:
    """What `encode` gives, on the rows' device: a contiguous tensor of a dtype that numpy has."""
    if codec == "int8":
        return _quantized(rows.float())
    return (rows.float() if codec == "float32" else rows.to(torch.bfloat16).view(torch.int16)).contiguous()


def decode(codec: str, data: bytearray, width: int) -> Tensor:
    """The inverse of `encode`: [n, width] float32 on the CPU; in float32 the tensor lies on `data` itself.

    Raises ActivationError for a wrong length or a value that is not finite.
    """
    groups = -(-width // GROUP)
    size = {"float32": 4 * width, "bf16": 2 * width, "int8": width + 4 * groups}[codec]
    _check_length(data, size)
    if codec == "int8":
        rows = _dequantized(torch.frombuffer(data, dtype=torch.uint8).view(-1, size), groups, width)
    else:
        dtype = torch.float32 if codec == "float32" else torch.bfloat16
        rows = torch.frombuffer(data, dtype=dtype).view(-1, width).float()
    # A sum is finite only where every value is (short of an overflow, which is as bad): one pass, no mask.
    if not math.isfinite(rows.sum(dtype=torch.float64).item()):
        raise ActivationError(_NOT_FINITE)
    return rows


def decode_bf16(data: bytearray, width: int) -> Tensor:
    """`decode` of bf16 where it stays so: [n, width] on `data` itself."""
    _check_length(data, 2 * width)
    bits = torch.frombuffer(data, dtype=torch.int16)
    # An exponent of ones is NaN or infinite.
    if bool(((bits & 0x7F80) == 0x7F80).any()):
        raise ActivationError(_NOT_FINITE)
    return bits.view(torch.bfloat16).view(-1, width)


def _check_length(data: bytearray, row: int) -> None:
    if not data or len(data) % row:
        raise ActivationError(f"{len(data)} bytes are no rows of {row}")


def _quantized(rows: Tensor) -> Tensor:
    """uint8 [n, bytes of a row]: scales, then codes."""
    width = rows.shape[1]
    grouped = F.pad(rows, (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    # Divided by a tensor: a device may multiply by the inverse of a number.
    scales = grouped.abs().amax(2) / torch.full((), 127.0, device=rows.device)
    safe = torch.where(scales > 0, scales, 1.0)
    codes = (grouped / safe[..., None]).round().to(torch.int8).flatten(1)[:, :width]
    return torch.cat((scales.contiguous().view(torch.uint8), codes.contiguous().view(torch.uint8)), 1)


def _dequantized(encoded: Tensor, groups: int, width: int) -> Tensor:
    scales = encoded[:, : 4 * groups].contiguous().view(torch.float32)
    codes = encoded[:, 4 * groups :].contiguous().view(torch.int8).float()
    return codes * scales.repeat_interleave(GROUP, 1)[:, :width]


class HostRows(Sequence[Any]):
    """Rows [n, width] of a device as float32 numpy arrays: each comes over when it is first asked for."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> HostRows: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return HostRows(self._rows[index])
        self._rows[index] = self._rows[index].float().cpu()
        return self._rows[index].numpy()
