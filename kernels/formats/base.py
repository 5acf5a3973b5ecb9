"""What every weight format is: a frozen description that turns one matrix into a few tensors and back.

Tensors here have a checkpoint's layout, which other programs read and write. What a device wants is its backend's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shape = tuple[int, int]

_PIECE = 1 << 20  # values


class FormatError(ValueError):
    """Tensors are not what a format asks for; the message is one sentence that says what is wrong and allowed."""


@dataclass(frozen=True)
class Format(ABC):
    """One way to store a matrix. Shapes are (out, in) of the dense matrix; tensors may be on any device."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What `--quant` and records call it."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Tensors:
        """weight [out, in] -> its tensors in the checkpoint's layout.

        Raises FormatError where weights of this format come from checkpoints only.
        """

    @abstractmethod
    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        """Raise FormatError unless these are the tensors, in the checkpoint's layout, of a matrix of `shape`."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense matrix [out, in], computed in `dtype`; float64 is the reference of every kernel."""

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix's tensors; where outliers count, without them."""

    @abstractmethod
    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        """The tensors of some rows [n] alone. Raises FormatError where rows share what they are made of."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One matrix in a format: its tensors in the checkpoint's layout, and its shape (out, in)."""

    format: Format
    tensors: Mapping[str, Tensor]
    shape: Shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in]."""
        return self.format.dequantize(self.tensors, self.shape, dtype)

    def rows(self, which: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows: which [n] -> [n, in]. Raises FormatError where the format has no rows apart."""
        taken = self.format.take_rows(self.tensors, self.shape, which)
        return self.format.dequantize(taken, (len(which), self.shape[1]), dtype)


def expect(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], format: str
) -> None:
    """Raise FormatError unless `tensors` are exactly the wanted ones, by shape and dtype."""
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise FormatError(f"{format} weights lack {missing[0]}: they consist of {', '.join(wanted)}.")
    if extra := sorted(set(tensors) - set(wanted)):
        raise FormatError(f"{format} weights have no {extra[0]}: they consist of {', '.join(wanted)}.")
    for name, (shape, dtype) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise FormatError(
                f"{name} of {format} weights is {found.dtype} {list(found.shape)}, {dtype} {list(shape)} is needed."
            )


def expect_finite(tensors: Mapping[str, Tensor], names: tuple[str, ...], format: str) -> None:
    """Raise FormatError where one of the named tensors holds an infinity or no number."""
    for name in names:
        if not bool(tensors[name].isfinite().all()):
            raise FormatError(f"{name} of {format} weights holds a value that is not finite.")


def matrix(weight: Tensor) -> Tensor:
    """A dense matrix in float32 on its way to be quantized. Raises FormatError for anything else."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise FormatError(f"a dense matrix is quantized, not {weight.dtype} {list(weight.shape)}.")
    if not bool(weight.isfinite().all()):
        raise FormatError("a matrix with values that are not finite cannot be quantized.")
    return weight.detach().float()


def by_pieces(weight: Tensor, quantize: Callable[[Tensor], Tensors]) -> Tensors:
    """What `quantize` makes of a few rows at a time, joined: its temporaries stay small beside the matrix."""
    rows = max(1, _PIECE // weight.shape[1])
    pieces = [quantize(part) for part in weight.split(rows)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def padded(length: int, unit: int) -> int:
    """`length` rounded up to whole units."""
    return -(-length // unit) * unit
