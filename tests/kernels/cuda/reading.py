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
    registers = _READERS[weights.layout.name.partition("<")[0]](
        blobs, weights
    )  # .., thread 128, register 16, element 2
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
    matrix = matrix[: weights.shape[0], : weights.shape[1]]
    if weights.columns is not None:
        matrix = torch.empty_like(matrix).index_copy_(1, weights.columns.long(), matrix)
    return matrix


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
    scale = _by_pair(blobs[..., 2048:], 2)[..., [0, 1] * 8].to(torch.int32).view(torch.float32).bfloat16()
    return _levels(blobs) * scale[..., None]


def _nf4_across(blobs: Tensor, _: Weights) -> Tensor:
    words = _by_pair(blobs[..., 2048:], 4)
    first, second = _halves(words[..., [0, 1] * 8])
    border = words[..., [2, 3] * 8]
    depth = torch.tensor([[16 * (i // 4) + 8 * (i // 2 % 2) + 2 * t for i in range(16)] for t in range(4)]).repeat(
        32, 1
    )
    scales = [torch.where(depth + e < border, first, second) for e in range(2)]
    return (_levels(blobs).float() * torch.stack(scales, -1)).bfloat16()


def _levels(blobs: Tensor) -> Tensor:
    words = _words(blobs[..., :2048]).unflatten(-1, (128, 4))
    levels = torch.tensor(LEVELS).bfloat16()
    registers = []
    for i in range(16):
        byte = words[..., i // 4] >> (7 + 8 * (i % 4))
        if i % 4 == 3:
            byte = byte & 1 | words[..., i // 4] << 1
        registers.append(torch.stack((levels[byte & 15], levels[byte >> 4 & 15]), -1))
    return torch.stack(registers, -2)


def _mxfp4(blobs: Tensor, _: Weights) -> Tensor:
    words = _words(blobs[..., :2048]).unflatten(-1, (128, 4))
    places = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
    registers = []
    for i in range(16):
        both = []
        for e in range(2):
            mantissa, low, high, sign = (words[..., i // 4] >> (at + 16 * e) & 1 for at in places[i % 4])
            exponent = low + 2 * high
            value = torch.where(exponent > 0, (1 + mantissa / 2) * 2.0 ** (exponent - 1), mantissa / 2)
            both.append(value * (1 - 2 * sign))
        registers.append(torch.stack(both, -1))
    return (torch.stack(registers, -2) * _two_scales(blobs[..., 2048:])).bfloat16()


def _fp8(blobs: Tensor, _: Weights) -> Tensor:
    words = torch.stack([_words(half).unflatten(-1, (128, 4)) for half in blobs[..., :4096].split(2048, -1)], -2)
    words = words.flatten(-2)
    codes = [[words[..., i // 2] >> (16 * e + 8 * (1 - i % 2)) & 255 for e in range(2)] for i in range(16)]
    values = torch.stack([torch.stack(pair, -1) for pair in codes], -2).to(torch.uint8).view(torch.float8_e4m3fn)
    low, high = _halves(_by_pair(blobs[..., 4096:], 1))
    return (values.float() * torch.cat((low, high) * 8, -1)[..., None]).bfloat16()


def _spqr(blobs: Tensor, _: Weights) -> Tensor:
    words = torch.cat((_words(blobs[..., :1024]).unflatten(-1, (128, 2)), _words(blobs[..., 1024:1536])[..., None]), -1)
    codes = [[words[..., i // 5] >> (3 * (i % 5) + 16 * e) & 7 for e in range(2)] for i in range(15)]
    codes.append([sum((words[..., b] >> (15 + 16 * e) & 1) << b for b in range(3)) for e in range(2)])
    numbers = torch.cat([_by_pair(blobs[..., at : at + 512], 4) for at in (1536, 2048)], -1)
    scale, middle = _halves(numbers[..., [2 * (i // 4) + i % 2 for i in range(16)]])
    three = torch.stack([torch.stack(pair, -1) for pair in codes], -2) - 4
    values = (three.double() * scale[..., None].double() + middle[..., None].double()).bfloat16()
    bases, entries = _words(blobs[..., 2560:2576]), _words(blobs[..., 2720:])
    starts = blobs[..., 2576:2720].unflatten(-1, (4, 36)).long()
    for ob, kb in torch.cartesian_prod(*map(torch.arange, blobs.shape[:2])).tolist():
        for thread in range(128):
            begin, end = (int(starts[ob, kb, thread // 32, thread % 32 + n]) for n in range(2))
            for n in range(begin, end):
                entry = int(entries[ob, kb, int(bases[ob, kb, thread // 32]) // 4 + n])
                bits = torch.tensor([entry & 0xFFFF], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
                values[ob, kb, thread, entry >> 16 & 15, entry >> 20] = bits[0]
    return values


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
    "Nf4Across": _nf4_across,
    "Mxfp4": _mxfp4,
    "Fp8": _fp8,
    "Spqr": _spqr,
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
