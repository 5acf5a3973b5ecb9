"""Quantized types of GGUF files, kept as stored: rows of blocks, each block with its scales (ggml's layouts)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, expect, expect_finite, matrix

SMALL = 32  # neighbours of a block of the types without "K"

# What the codes of IQ4 mean, denser around zero.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Decode = Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Gguf(Format):
    """`blocks` uint8 [out, in / block · size]: `block` neighbours of a row take `size` bytes."""

    label: str
    block: int
    size: int
    decode: Decode
    """uint8 [n, size] -> [n, block] in a dtype."""
    encode: Callable[[Tensor], Tensor] | None = None
    """float32 [n, block] -> uint8 [n, size], for types whose rounding is to nearest."""
    halves: tuple[int, ...] = (0,)
    """Where float16 numbers are in a block."""
    signed: bool = False
    """Codes are bytes with a sign."""

    @property
    def name(self) -> str:
        return self.label

    def quantize(self, weight: Tensor) -> Tensors:
        if self.encode is None:
            raise FormatError(f"{self.name} weights come from GGUF files.")
        weight = matrix(weight)
        self._check_width(weight.shape[1])
        return {"blocks": self.encode(weight.reshape(-1, self.block)).view(len(weight), -1)}

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        self._check_width(shape[1])
        expect(tensors, {"blocks": ((shape[0], shape[1] // self.block * self.size), torch.uint8)}, self.name)
        blocks = tensors["blocks"].reshape(-1, self.size)
        scales = {"scales": torch.cat([_half(blocks, at, torch.float16) for at in self.halves])}
        expect_finite(scales, ("scales",), self.name)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.decode(tensors["blocks"].view(-1, self.size), dtype).view(shape)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {"blocks": tensors["blocks"][which]}

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.block * self.size

    def _check_width(self, width: int) -> None:
        if width % self.block:
            raise FormatError(f"{self.name} weights have rows of a multiple of {self.block} columns, not {width}.")


def _half(blocks: Tensor, at: int, dtype: torch.dtype) -> Tensor:
    """One float16 a block at byte `at`: [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(dtype)


def _halves(packed: Tensor) -> Tensor:
    """Low halves, then high halves, along the last axis."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits at byte `at`, shifted to the value 16: uint8 [n, 32]."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (blocks[:, at : at + 4, None] >> places & 1).flatten(1) << 4


def _signed(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.int8)


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return (_halves(blocks[:, 2:]).to(dtype) - 8) * _half(blocks, 0, dtype)


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return _halves(blocks[:, 4:]).to(dtype) * _half(blocks, 0, dtype) + _half(blocks, 2, dtype)


def _q5_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return ((_halves(blocks[:, 6:]) | _fifth_bits(blocks, 2)).to(dtype) - 16) * _half(blocks, 0, dtype)


def _q5_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    codes = _halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.to(dtype) * _half(blocks, 0, dtype) + _half(blocks, 2, dtype)


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return _signed(blocks[:, 2:]).to(dtype) * _half(blocks, 0, dtype)


def _k_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the 8 groups of a K block, [n, 8, 1], from 12 bytes of 6-bit numbers."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, rest & 15 | low >> 2 & 48), 1).to(dtype)
    minimum = torch.cat((high & 63, rest >> 4 | high >> 2 & 48), 1).to(dtype)
    return (_half(blocks, 0, dtype) * scale)[..., None], (_half(blocks, 2, dtype) * minimum)[..., None]


def _k_halves(packed: Tensor, width: int) -> Tensor:
    """[n, 8, 32]: each run of `width` bytes holds `width` low, then `width` high halves."""
    return _halves(packed.unflatten(1, (-1, width))).reshape(len(packed), -1, 32)


def _q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scale, minimum = _k_scales(blocks, dtype)
    return (_k_halves(blocks[:, 16:], 32).to(dtype) * scale - minimum).flatten(1)


def _q5_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scale, minimum = _k_scales(blocks, dtype)
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> places & 1) << 4
    return ((_k_halves(blocks[:, 48:], 32) | fifth).to(dtype) * scale - minimum).flatten(1)


def _q6_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> places & 3
    codes = _k_halves(blocks[:, :128], 64) | high.reshape(-1, 8, 32) << 4
    scale = _half(blocks, 208, dtype) * _signed(blocks[:, 192:208]).to(dtype)
    return ((codes.to(dtype) - 32).reshape(-1, 16, 16) * scale[..., None]).flatten(1)


def _quarters(packed: Tensor) -> Tensor:
    """[n, 16, 16]: each run of 32 bytes holds four runs of 32 numbers of 2 bits, the lowest bits first."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unflatten(1, (-1, 1, 32)) >> places & 3).reshape(len(packed), -1, 16)


def _q2_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scale = _half(blocks, 80, dtype) * (blocks[:, :16] & 15).to(dtype)
    minimum = _half(blocks, 82, dtype) * (blocks[:, :16] >> 4).to(dtype)
    return (_quarters(blocks[:, 16:80]).to(dtype) * scale[..., None] - minimum[..., None]).flatten(1)


def _q3_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    third = (blocks[:, None, :32] >> places & 1).reshape(-1, 16, 16) << 2
    high = (blocks[:, None, 104:108] >> 2 * places[:4] & 3).flatten(1) << 4
    scale = _half(blocks, 108, dtype) * ((_halves(blocks[:, 96:104]) | high).to(dtype) - 32)
    return (((_quarters(blocks[:, 32:96]) | third).to(dtype) - 4) * scale[..., None]).flatten(1)


def _iq4_nl(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return _levels(_halves(blocks[:, 2:]), dtype) * _half(blocks, 0, dtype)


def _iq4_xs(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, 2:4, None] >> places & 3).flatten(1) << 4
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), -1).flatten(1)
    scale = _half(blocks, 0, dtype) * ((low | high).to(dtype) - 32)
    return (_levels(_halves(blocks[:, 8:].unflatten(1, (8, 16))), dtype) * scale[..., None]).flatten(1)


def _levels(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_IQ4, dtype=dtype, device=codes.device)[codes.long()]


def _pair_halves(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).chunk(2, 1)
    return low | high << 4


def _bytes_of(halves: Tensor) -> Tensor:
    return halves.half().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _encode_q4_0(values: Tensor) -> Tensor:
    extreme = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = extreme / -8
    codes = (values * _inverse(scale) + 8.5).floor().clamp(0, 15)
    return torch.cat((_bytes_of(scale), _pair_halves(codes)), 1)


def _encode_q4_1(values: Tensor) -> Tensor:
    low = values.amin(1, keepdim=True)
    scale = (values.amax(1, keepdim=True) - low) / 15
    codes = ((values - low) * _inverse(scale) + 0.5).floor().clamp(0, 15)
    return torch.cat((_bytes_of(scale), _bytes_of(low), _pair_halves(codes)), 1)


def _encode_q8_0(values: Tensor) -> Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values * _inverse(scale)).round().to(torch.int8)
    return torch.cat((_bytes_of(scale), codes.view(torch.uint8)), 1)


TYPES = {
    kind.name: kind
    for kind in (
        Gguf("q4_0", 32, 18, _q4_0, _encode_q4_0),
        Gguf("q4_1", 32, 20, _q4_1, _encode_q4_1, (0, 2)),
        Gguf("q8_0", 32, 34, _q8_0, _encode_q8_0, signed=True),
        Gguf("q5_0", 32, 22, _q5_0),
        Gguf("q5_1", 32, 24, _q5_1, halves=(0, 2)),
        Gguf("iq4_nl", 32, 18, _iq4_nl),
        Gguf("iq4_xs", 256, 136, _iq4_xs),
        Gguf("q2_k", 256, 84, _q2_k, halves=(80, 82)),
        Gguf("q3_k", 256, 110, _q3_k, halves=(108,)),
        Gguf("q4_k", 256, 144, _q4_k, halves=(0, 2)),
        Gguf("q5_k", 256, 176, _q5_k, halves=(0, 2)),
        Gguf("q6_k", 256, 210, _q6_k, halves=(208,)),
    )
}
