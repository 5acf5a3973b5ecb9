"""Blobs of weights read as the comments of `formats.cuh` say, thread by thread: what the kernels must find in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from petal.kernels.cuda.layout import Weights
from petal.kernels.formats.nf4 import LEVELS
from torch import Tensor

_Read = Callable[[Tensor], Tensor]


def dense(weights: Weights) -> Tensor:
    """The matrix [out, in] in float64, in bfloat16 where `formats.cuh` rounds, times the scales of outputs."""
    blobs = weights.blobs
    registers = _READERS[weights.layout.name](blobs, weights)  # .., thread 128, register 16, element 2
    out = torch.empty(*blobs.shape[:2], 64, 64, dtype=torch.float64)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for i in range(16):
            j, c, h = i // 4, i // 2 % 2, i % 2
            for e in range(2):
                depth = 16 * j + 8 * c + 2 * t + e
                if weights.layout.reordered:
                    span, eighth = 32 * (depth // 32), depth // 8
                    depth = span + 8 * (depth % 8 // 2) + 2 * (eighth % 4) + depth % 2
                out[:, :, 16 * warp + 8 * h + g, depth] = registers[:, :, thread, i, e].double()
    matrix = out.transpose(1, 2).flatten(2).flatten(0, 1)
    if weights.extension is not None:
        width = weights.shape[1]
        behind = matrix[:, width : width + len(weights.extension.columns)] * weights.extension.factors.double()
        matrix = matrix.index_add(1, weights.extension.columns.long(), behind)
    if weights.scale is not None:
        matrix = matrix * weights.scale.double()[:, None]
    return matrix[: weights.shape[0], : weights.shape[1]]


def _words(part: Tensor) -> Tensor:
    """uint8 [.., 4n] -> int64 [.., n]"""
    return part.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high bfloat16 of words, in float32."""
    return tuple((w & 0xFFFF).to(torch.int32).bitwise_left_shift(16).view(torch.float32) for w in (words, words >> 16))


def _by_pair(part: Tensor, words: int) -> Tensor:
    """Words of pairs of outputs [.., 32 · words] -> [.., thread 128, words]."""
    pairs = _words(part).unflatten(-1, (4, 8, words))
    return pairs[..., None, :].expand(*pairs.shape[:-1], 4, words).flatten(2, 4)


def _nibbles(part: Tensor) -> Tensor:
    """[.., 2048] -> codes int64 [.., thread, register 16, element 2]"""
    words = _words(part).unflatten(-1, (128, 4))
    codes = [[words[..., i // 4] >> (4 * (i % 4) + 16 * e) & 15 for e in range(2)] for i in range(16)]
    return torch.stack([torch.stack(pair, -1) for pair in codes], -2)


def _scaled(codes: Tensor, low: Tensor | int, scale: Tensor) -> Tensor:
    return ((codes.float() + low) * scale).bfloat16()


def _int4(blobs: Tensor, _: Weights) -> Tensor:
    scale, zero = _halves(_by_pair(blobs[..., 2048:], 2)[..., [0, 1] * 8])
    return _scaled(_nibbles(blobs[..., :2048]) + 128, zero[..., None], scale[..., None])


def _by_half(blobs: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Numbers of registers where each 32 depths have their own: both bfloat16 [.., thread, register 16, 1]."""
    first, second = (_by_pair(blobs[..., at + 256 * i : at + 256 * (i + 1)], 2) for i in range(2))
    low, high = _halves(torch.cat((first[..., [0, 1] * 4], second[..., [0, 1] * 4]), -1))
    return low[..., None], high[..., None]


def _int4_32(blobs: Tensor, _: Weights) -> Tensor:
    scale, zero = _by_half(blobs, 2048)
    return _scaled(_nibbles(blobs[..., :2048]) + 128, zero, scale)


def _affine(codes: Tensor, blobs: Tensor) -> Tensor:
    scale, middle = _by_half(blobs, 2048)
    return (codes.double() * scale.double() + middle.double()).bfloat16()


def _q4_1(blobs: Tensor, _: Weights) -> Tensor:
    return _affine(_nibbles(blobs[..., :2048]) - 8, blobs)


def _q5_k(blobs: Tensor, _: Weights) -> Tensor:
    fifth = _words(blobs[..., 2560:])
    bits = torch.stack([torch.stack([fifth >> (i + 16 * e) & 1 for e in range(2)], -1) for i in range(16)], -2)
    return _affine(_nibbles(blobs[..., :2048]) + 16 * bits - 16, blobs)


def _q6_k(blobs: Tensor, _: Weights) -> Tensor:
    upper = _words(blobs[..., 2048:3072]).unflatten(-1, (128, 2))
    bits = [[upper[..., i // 8] >> (2 * (i % 8) + 16 * e) & 3 for e in range(2)] for i in range(16)]
    codes = _nibbles(blobs[..., :2048]) + 16 * torch.stack([torch.stack(pair, -1) for pair in bits], -2)
    low, high = _halves(_by_pair(blobs[..., 3072:], 4))  # words: h, two groups of 16 depths each
    scales = [(high if i // 4 % 2 else low)[..., 2 * (i % 2) + i // 8] for i in range(16)]
    return _scaled(codes, -32, torch.stack(scales, -1)[..., None])


def _two_scales(part: Tensor) -> Tensor:
    """A word of an output holds the scales of its two groups of 32 depths."""
    low, high = _halves(_by_pair(part, 2))
    return torch.cat((low[..., [0, 1] * 4], high[..., [0, 1] * 4]), -1)[..., None]


def _q4_0(blobs: Tensor, _: Weights) -> Tensor:
    return _scaled(_nibbles(blobs[..., :2048]), -8, _two_scales(blobs[..., 2048:]))


def _nf4(blobs: Tensor, _: Weights) -> Tensor:
    words = _words(blobs[..., :2048]).unflatten(-1, (128, 4))
    levels = torch.tensor(LEVELS).bfloat16()
    registers = []
    for i in range(16):
        byte = words[..., i // 4] >> (7 + 8 * (i % 4))
        if i % 4 == 3:
            byte = byte & 1 | words[..., i // 4] << 1
        registers.append(torch.stack((levels[byte & 15], levels[byte >> 4 & 15]), -1))
    scale = _by_pair(blobs[..., 2048:], 2)[..., [0, 1] * 8].to(torch.int32).view(torch.float32).bfloat16()
    return torch.stack(registers, -2) * scale[..., None]


def _bytes(part: Tensor) -> Tensor:
    words = torch.stack([_words(half).unflatten(-1, (128, 4)) for half in part.split(2048, -1)], -2).flatten(-2)
    codes = [[words[..., i // 2] >> (16 * (i % 2) + 8 * e) & 255 for e in range(2)] for i in range(16)]
    return torch.stack([torch.stack(pair, -1) for pair in codes], -2).to(torch.uint8).view(torch.int8)


def _int8(blobs: Tensor, _: Weights) -> Tensor:
    return _bytes(blobs)


def _q8_0(blobs: Tensor, _: Weights) -> Tensor:
    return _scaled(_bytes(blobs[..., :4096]), 0, _two_scales(blobs[..., 4096:]))


def _bf16(blobs: Tensor, _: Weights) -> Tensor:
    words = torch.stack([_words(part).unflatten(-1, (128, 4)) for part in blobs.split(2048, -1)], -2).flatten(-2)
    return torch.stack(_halves(words), -1)


def _aqlm(blobs: Tensor, weights: Weights) -> Tensor:
    assert weights.codebooks is not None
    books = weights.codebooks.float()
    codes = blobs.long().unflatten(-1, (128, 4, 2))  # four vectors of a thread: two spans of 32 depths, h
    vectors = (books[0][codes[..., 0]] + books[1][codes[..., 1]]).bfloat16().unflatten(-1, (4, 2))
    registers = [vectors[..., 2 * (i // 8) + i % 2, i // 4 % 2 * 2 + i // 2 % 2, :] for i in range(16)]
    return torch.stack(registers, -2)


def _aqlm_1x16(blobs: Tensor, weights: Weights) -> Tensor:
    assert weights.codebooks is not None
    codes = (blobs.long()[..., 0::2] | blobs.long()[..., 1::2] << 8).unflatten(-1, (128, 4))
    vectors = weights.codebooks[0][codes].unflatten(-1, (4, 2))
    registers = [vectors[..., 2 * (i // 8) + i % 2, i // 4 % 2 * 2 + i // 2 % 2, :] for i in range(16)]
    return torch.stack(registers, -2)


_READERS: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "Int4": _int4,
    "Int4Group32": _int4_32,
    "Nf4": _nf4,
    "Int8": _int8,
    "Bf16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Aqlm2x8": _aqlm,
    "Aqlm1x16": _aqlm_1x16,
}
