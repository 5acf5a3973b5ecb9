"""The number formats of GGUF and their decoders to float32, in ggml's order of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import CheckpointError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Values decoded at a time: temporaries of this size stay in the processor's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class GgmlType:
    """A stored type: `block` values take `size` bytes. `decode` maps uint8 [n, size] to float32 [n, block]."""

    name: str
    block: int
    size: int
    decode: Callable[[Bytes], Floats] | None = None


def dequantize(
    raw: Bytes, shape: tuple[int, ...], kind: GgmlType, done: Callable[[Bytes], None] = lambda part: None
) -> Floats:
    """Decode flat stored bytes to fresh float32 in `shape`; `done` hears of parts of `raw` that are not needed again.

    Raises CheckpointError for a type without decoder.
    """
    if kind.decode is None:
        raise CheckpointError(f"Type {kind.name} cannot be decoded: use a file of Q4_0 to Q8_0, Q4_K to Q6_K or F16.")
    blocks = raw.reshape(-1, kind.size)
    out = np.empty((len(blocks), kind.block), np.float32)
    step = _CHUNK // kind.block
    # Corrupt scales may be infinite; that is the file's business, not a warning.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = kind.decode(blocks[start : start + step])
            done(blocks[start : start + step])
    return out.reshape(shape)


def _half(blocks: Bytes, at: int) -> Floats:
    """One float16 per block at byte `at`, as float32 [n, 1]."""
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves, then high halves, along the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits at byte `at`, already shifted to the value 16: uint8 [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _scale(quants: npt.NDArray[Any], scale: Floats) -> Floats:
    values = quants.astype(np.float32)
    return np.multiply(values, scale, out=values)


def _scale_shift(quants: npt.NDArray[Any], scale: Floats, shift: Floats) -> Floats:
    values = _scale(quants, scale)
    return np.add(values, shift, out=values)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _scale(_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Floats:
    return _scale_shift(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _scale(quants.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Floats:
    return _scale_shift(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Floats:
    return _scale(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scale and minus-minimum of the 8 groups of a K block, float32 [n, 8, 1], from 12 bytes of 6-bit numbers."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (rest & 15) | ((low >> 2) & 48)], axis=1).astype(np.float32)
    minimum = np.concatenate([high & 63, (rest >> 4) | ((high >> 2) & 48)], axis=1).astype(np.float32)
    return (_half(blocks, 0) * scale)[..., None], -(_half(blocks, 2) * minimum)[..., None]


def _k_nibbles(packed: Bytes, width: int) -> Bytes:
    """uint8 [n, groups, 32]: each run of `width` bytes holds `width` low, then `width` high halves."""
    return _nibbles(packed.reshape(len(packed), -1, width)).reshape(len(packed), -1, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _scale_shift(_k_nibbles(blocks[:, 16:], 32), *_k_scales(blocks)).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Floats:
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & np.uint8(1)) << np.uint8(4)
    return _scale_shift(_k_nibbles(blocks[:, 48:], 32) | fifth, *_k_scales(blocks)).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    quants = _k_nibbles(blocks[:, :128], 64) | (high.reshape(-1, 8, 32) << np.uint8(4))
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _scale((quants.view(np.int8) - np.int8(32)).reshape(-1, 16, 16), scale[..., None]).reshape(-1, 256)


# Types without a decoder are known by size, so that a file holding them can still be listed.
GGML_TYPES = {
    0: GgmlType("F32", 1, 4, _f32),
    1: GgmlType("F16", 1, 2, _f16),
    2: GgmlType("Q4_0", 32, 18, _q4_0),
    3: GgmlType("Q4_1", 32, 20, _q4_1),
    6: GgmlType("Q5_0", 32, 22, _q5_0),
    7: GgmlType("Q5_1", 32, 24, _q5_1),
    8: GgmlType("Q8_0", 32, 34, _q8_0),
    9: GgmlType("Q8_1", 32, 40),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144, _q4_k),
    13: GgmlType("Q5_K", 256, 176, _q5_k),
    14: GgmlType("Q6_K", 256, 210, _q6_k),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2, _bf16),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}
