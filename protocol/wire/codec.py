"""How activations cross a link: float32 (exact), bf16, or int8 with one scale per token and 64 channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import PetalError
from ..petal_pb2 import BF16, FLOAT32, INT8, Codec

CODECS: dict[str, Codec] = {"float32": FLOAT32, "bf16": BF16, "int8": INT8}
CODEC_NAMES: dict[Codec, str] = {codec: name for name, codec in CODECS.items()}
# One scale a token would cost eight times the KL divergence of this.
GROUP = 64


class CodecError(PetalError, ValueError):
    """Bytes that are no activations of the stated shape."""


def row_bytes(codec: Codec, width: int) -> int:
    """Encoded bytes of one row of `width` channels."""
    if codec == FLOAT32:
        return 4 * width
    if codec == BF16:
        return 2 * width
    if codec == INT8:
        return width + 4 * -(-width // GROUP)
    raise CodecError(f"codec {codec} is none of {', '.join(CODECS)}")


def encode(codec: Codec, rows: NDArray[np.float32]) -> bytes:
    """[n, width] float32 -> n * row_bytes(codec, width) bytes."""
    if codec == FLOAT32:
        return rows.tobytes()
    if codec == BF16:
        return to_bf16(rows).tobytes()
    scales, quantized = _quantize(rows)
    return np.concatenate([scales.view(np.uint8), quantized.view(np.uint8)], axis=1).tobytes()


def decode(codec: Codec, data: bytes, width: int) -> NDArray[np.float32]:
    """The inverse of `encode`: [n, width] float32. CodecError for a wrong length or a value that is not finite."""
    size = row_bytes(codec, width)
    if not data or len(data) % size:
        raise CodecError(f"{len(data)} bytes are no rows of {size}")
    if codec == FLOAT32:
        rows = np.frombuffer(data, np.float32).reshape(-1, width)
    elif codec == BF16:
        rows = from_bf16(np.frombuffer(data, np.uint16)).reshape(-1, width)
    else:
        rows = _dequantize(np.frombuffer(data, np.uint8).reshape(-1, size), width)
    # A sum is finite only where every value is (short of an overflow, which is as bad): one pass, no mask.
    with np.errstate(all="ignore"):
        total = np.add.reduce(rows, axis=None, dtype=np.float64)
    if not np.isfinite(total):
        raise CodecError("activations hold a value that is not finite")
    return rows


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even; the bit pattern in uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry some NaNs over into a small number, and the next peer could not see the fault.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _groups(width: int) -> int:
    return -(-width // GROUP)


def _quantize(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    n, width = rows.shape
    padded = np.zeros((n, _groups(width) * GROUP), np.float32)
    padded[:, :width] = rows
    grouped = padded.reshape(n, -1, GROUP)
    scales = np.abs(grouped).max(axis=2) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    quantized = np.rint(grouped / safe[:, :, None]).astype(np.int8)
    return scales, np.ascontiguousarray(quantized.reshape(n, -1)[:, :width])


def _dequantize(data: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    split = 4 * _groups(width)
    scales = np.ascontiguousarray(data[:, :split]).view(np.float32)
    quantized = data[:, split:].view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore"):  # a scale that is not finite is found by the caller
        return quantized * np.repeat(scales, GROUP, axis=1)[:, :width]
