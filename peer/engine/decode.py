"""Activations from the wire as tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...protocol.petal_pb2 import FLOAT32, Codec
from ...protocol.wire.codec import CodecError, decode


def decode_rows(codec: Codec, data: bytearray, width: int) -> Tensor:
    """[n, width] float32; in float32 the tensor lies on `data` itself. Raises CodecError as `decode` does."""
    if codec != FLOAT32:
        return torch.tensor(decode(codec, bytes(data), width))
    if not data or len(data) % (4 * width):
        raise CodecError(f"{len(data)} bytes are no rows of {4 * width}")
    rows = torch.frombuffer(data, dtype=torch.float32).view(-1, width)
    if not math.isfinite(rows.sum(dtype=torch.float64).item()):
        raise CodecError("activations hold a value that is not finite")
    return rows
