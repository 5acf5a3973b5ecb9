"""Blobs of 64 outputs x 64 depths, as `src/formats.cuh` reads them: how each layout writes its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Tensors
from ..formats.nf4 import LEVELS

BLOB = 64
UNIT = 512  # depths; four quarters of whole blobs in pairs
_BIAS = 128  # codes count from there: a bfloat16 from 128 to 256 holds whole numbers


@dataclass(frozen=True)
class Layout:
    """How one structure of `formats.cuh` stores a blob."""

    name: str
    bytes: int
    group: int
    """Depths that share numbers; 0: none do."""
    write: Callable[[Tensors], list[Tensor]]
    """Fields of whole blobs -> the parts of a blob one after another, each [blobs of outputs, of depths, bytes]."""
    scaled: bool = False
    """Each output has one scale, applied to its sum."""
    table: int = 0
    """Bytes of shared memory that a block needs beside its ring."""
    heavy: bool = False
    """Unpacking takes many instructions a weight: more groups of warps are better than more blobs a group."""
    cached: bool = False
    """What it looks up lies in the first-level cache, which shares its memory with the ring."""
    reordered: bool = False
    """Activations lie in the order of codebooks of 8 depths."""


def bytes_of(part: Tensor) -> Tensor:
    """[blobs of outputs, blobs of depths, ...] -> [.., .., bytes]"""
    return part.flatten(2).contiguous().view(torch.uint8)


def fragments(codes: Tensor) -> Tensor:
    """[out, in] -> [out / 64, in / 64, warp 4, g 8, t 4, j 4, c 2, h 2, e 2]: the order of `formats.cuh`."""
    v = codes.unflatten(1, (-1, 4, 2, 4, 2)).unflatten(0, (-1, 4, 2, 8))  # rb w h g, kb j c t e
    return v.permute(0, 4, 1, 3, 7, 5, 6, 2, 8)


def numbers(values: Tensor, per_blob: int) -> Tensor:
    """[out, groups] -> [out / 64, in / 64, groups of a blob, pair of outputs 32, h 2]."""
    v = values.unflatten(1, (-1, per_blob)).unflatten(0, (-1, 4, 2, 8))  # rb w h g, kb i
    return v.permute(0, 4, 5, 1, 3, 2).flatten(3, 4)


def _words(codes: Tensor, places: Callable[[int, int, int], int]) -> Tensor:
    """Four bits of each code in words int32 [.., .., thread 128, j 4]; places: the lowest bit of (c, h, e)."""
    v = fragments(codes & 15)
    words = torch.zeros(v.shape[:-3], dtype=torch.int32, device=codes.device)
    for c in range(2):
        for h in range(2):
            for e in range(2):
                words |= v[..., c, h, e].int() << places(c, h, e)
    return words.flatten(2, 4)


def _pairs(codes: Tensor) -> Tensor:
    return _words(codes, lambda c, h, e: 4 * (2 * c + h) + 16 * e)


def _upper(codes: Tensor, bits: int) -> Tensor:
    """Bits above the fourth in words int32 [.., .., thread 128, words]: register i at bits · i, element 1 16 higher."""
    v = fragments(codes >> 4).flatten(5, 7)  # .. thread, i, e
    held = 16 // bits  # registers a word
    words = torch.zeros(*v.shape[:-2], 16 // held, dtype=torch.int32, device=codes.device)
    for i in range(16):
        for e in range(2):
            words[..., i // held] |= v[..., i, e].int() << (bits * (i % held) + 16 * e)
    return words.flatten(2, 4)


def two(low: Tensor, high: Tensor) -> Tensor:
    """Pairs of bfloat16 side by side."""
    return torch.stack((low.bfloat16(), high.bfloat16()), -1)


def _by_output(scale: Tensor) -> Tensor:
    """Both bfloat16 scales of an output, of groups of 32, side by side."""
    return numbers(scale.bfloat16(), 2).permute(0, 1, 3, 4, 2)


def _write_int4(rows: Tensors) -> list[Tensor]:
    per_blob = rows["scale"].shape[1] * BLOB // rows["codes"].shape[1]
    scale, zero = (numbers(rows[name], per_blob) for name in ("scale", "zero"))
    return [_pairs(rows["codes"]), two(scale, -_BIAS - zero.float())]


def _write_affine(rows: Tensors) -> list[Tensor]:
    return [_pairs(rows["codes"]), two(numbers(rows["scale"], 2), numbers(rows["middle"], 2))]


def _write_q5_k(rows: Tensors) -> list[Tensor]:
    return [*_write_affine(rows), _upper(rows["codes"], 1)]


def _write_q6_k(rows: Tensors) -> list[Tensor]:
    scale = numbers(rows["scale"].bfloat16(), 4).permute(0, 1, 3, 4, 2)  # pair, h, group
    return [_pairs(rows["codes"]), _upper(rows["codes"], 2), scale]


def _nf4_words(codes: Tensor) -> Tensor:
    words = _words(codes, lambda c, h, e: 8 * (2 * c + h) + 4 * e)
    return (words << 7) | (words >> 25 & 0x7F)


def _write_nf4(rows: Tensors) -> list[Tensor]:
    return [_nf4_words(rows["codes"]), numbers(rows["scale"].float(), 1)]


def _write_q4_0(rows: Tensors) -> list[Tensor]:
    return [_pairs(rows["codes"]), _by_output(rows["scale"])]


def _write_int8(rows: Tensors) -> list[Tensor]:
    v = fragments(rows["codes"]).flatten(2, 4)  # .. thread, j, c, h, e
    return [v.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4, 5, 6, 7)]


def _write_q8_0(rows: Tensors) -> list[Tensor]:
    return [*_write_int8(rows), _by_output(rows["scale"])]


def _write_fp8(rows: Tensors) -> list[Tensor]:
    v = fragments(rows["codes"]).flatten(2, 4).unflatten(3, (2, 2))  # .., thread, plane, j, c, h, e
    codes = v.permute(0, 1, 3, 2, 4, 5, 7, 6).flip(-1)
    return [codes, numbers(rows["scale"].bfloat16(), 1)]


# Where a half of a word keeps the bits of its four codes, the lowest first: three are a shift away from their places
# in a bfloat16, 6 to 8 and 15.
_MXFP4_PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))


def _write_mxfp4(rows: Tensors) -> list[Tensor]:
    v = fragments(rows["codes"]).flatten(6, 7).int()  # .. warp, g, t, j, p, e
    words = torch.zeros(v.shape[:-2], dtype=torch.int32, device=v.device)
    for p, places in enumerate(_MXFP4_PLACES):
        for bit, place in enumerate(places):
            for e in range(2):
                words |= (v[..., p, e] >> bit & 1) << (place + 16 * e)
    return [words.flatten(2, 4), _by_output(rows["scale"])]


def _write_nf4_across(rows: Tensors) -> list[Tensor]:
    scales = two(numbers(rows["scale"], 1), numbers(rows["second"], 1)).view(torch.int32)[..., 0]
    return [_nf4_words(rows["codes"]), torch.cat((scales, numbers(rows["border"].int(), 1)), -1)]


def _write_bf16(rows: Tensors) -> list[Tensor]:
    return [fragments(rows["codes"]).flatten(2, 4).permute(0, 1, 3, 2, 4, 5, 6)]


def _write_aqlm(rows: Tensors) -> list[Tensor]:
    v = rows["codes"].unflatten(1, (-1, 2, 4)).unflatten(0, (-1, 4, 2, 8))  # rb w h g, kb s t book
    return [v.permute(0, 4, 1, 3, 6, 5, 2, 7)]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("Int4", 2304, 64, _write_int4),
        Layout("Int4Group32", 2560, 32, _write_int4),
        Layout("Nf4", 2304, 64, _write_nf4, table=32768, heavy=True),
        Layout("Nf4Across", 2560, 64, _write_nf4_across, table=32768, heavy=True),
        Layout("Mxfp4", 2304, 32, _write_mxfp4),
        Layout("Fp8", 4224, 64, _write_fp8),
        Layout("Int8", 4096, 0, _write_int8, scaled=True),
        Layout("Bf16", 8192, 0, _write_bf16),
        Layout("Q4_0", 2304, 32, _write_q4_0),
        Layout("Q4_1", 2560, 32, _write_affine),
        Layout("Q8_0", 4352, 32, _write_q8_0),
        Layout("Q5_K", 3072, 32, _write_q5_k, heavy=True),
        Layout("Q6_K", 3584, 16, _write_q6_k, heavy=True),
        Layout("Aqlm2x8", 1024, 0, _write_aqlm, scaled=True, table=65536, heavy=True, reordered=True),
        Layout("Aqlm1x16", 1024, 0, _write_aqlm, scaled=True, heavy=True, cached=True, reordered=True),
    )
}


def nf4_levels() -> str:
    """The levels as `formats.cuh` wants them: bits of bfloat16."""
    bits = torch.tensor(LEVELS).bfloat16().view(torch.int16).tolist()
    return ",".join(f"0x{b & 0xFFFF:04X}" for b in bits)
