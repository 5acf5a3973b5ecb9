"""Additive codebooks (AQLM, Egiazarian et al., arXiv 2401.06118): a group of 8 weights is a sum of codebook vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, expect, expect_finite

GROUP = 8


@dataclass(frozen=True)
class Aqlm(Format):
    """w[o, 8j:8j + 8] = scales[o] · Σ_c codebooks[c, codes[o, j, c]].

    codebooks float16 [C, 2^bits, 1, 8]; codes int8 (bits ≤ 8) or int16 [out, in / 8, C], unsigned values in signed
    storage; scales float16 [out, 1, 1, 1].
    """

    codebooks: int = 2
    bits: int = 8

    def __post_init__(self) -> None:
        if not (1 <= self.codebooks <= 4 and 1 <= self.bits <= 16):
            raise FormatError(f"aqlm has 1 to 4 codebooks of 1 to 16 bits, not {self.codebooks} of {self.bits}.")

    @property
    def name(self) -> str:
        return "aqlm" if (self.codebooks, self.bits) == (2, 8) else f"aqlm-{self.codebooks}x{self.bits}"

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits <= 8 else torch.int16

    def quantize(self, weight: Tensor) -> Tensors:
        raise FormatError("aqlm weights need calibration: load an AQLM checkpoint, or make one with `petal quantize`.")

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        out, width = shape
        if width % GROUP:
            raise FormatError(f"aqlm weights have rows of a multiple of {GROUP} columns, not {width}.")
        wanted = {
            "codebooks": ((self.codebooks, 1 << self.bits, 1, GROUP), torch.float16),
            "codes": ((out, width // GROUP, self.codebooks), self.code_dtype),
            "scales": ((out, 1, 1, 1), torch.float16),
        }
        expect(tensors, wanted, self.name)
        expect_finite(tensors, ("codebooks", "scales"), self.name)
        highest = int(_unsigned(tensors["codes"]).max())
        if highest >> self.bits:
            raise FormatError(f"a code of {self.name} weights is {highest}, a codebook has {1 << self.bits} vectors.")

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        codes, books = _unsigned(tensors["codes"]), tensors["codebooks"].to(dtype)
        vectors = [book[codes[..., c], 0] for c, book in enumerate(books)]
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return (total * tensors["scales"].to(dtype)[..., 0]).flatten(1)

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {name: t if name == "codebooks" else t[which] for name, t in tensors.items()}

    def nbytes(self, shape: Shape) -> int:
        codes = shape[0] * (shape[1] // GROUP) * self.codebooks * self.code_dtype.itemsize
        return codes + 2 * shape[0] + 2 * GROUP * (self.codebooks << self.bits)


def _unsigned(codes: Tensor) -> Tensor:
    return codes.long() & (0xFF if codes.dtype == torch.int8 else 0xFFFF)
