"""A linear layer whose weights stay quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .cpu.linear import PANEL
from .cpu.quantized import NativeWeights
from .cpu.select import device_of, select
from .formats.base import Format, FormatError, Shape, padded


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in any format; where `adapter` is set, its result for x is added.

    On a CPU a row's bits do not depend on other rows. int8, int4, nf4 and the small GGUF types multiply in integers
    (integer.h); others are decoded to bfloat16, bit for bit as `PackedLinear` has it with the dequantized weights.
    There are no gradients.
    """

    adapter: nn.Module | None
    bias: Tensor

    def __init__(self, format: Format, tensors: Mapping[str, Tensor], shape: Shape, bias: Tensor | None = None) -> None:
        """tensors: in the checkpoint's layout, of a matrix of `shape` (out, in); bias: [out].

        Raises FormatError where they do not fit.
        """
        super().__init__()
        if bias is not None and tuple(bias.shape) != shape[:1]:
            raise FormatError(f"a bias of {list(bias.shape)} does not fit {shape[0]} outputs.")
        self.format = format
        self.out_features, self.in_features = shape
        for name, tensor in format.pack(tensors, shape).items():
            self.register_buffer(f"packed_{name}", tensor)
        self._names = tuple(name.removeprefix("packed_") for name in self._buffers)
        self.register_buffer("bias", torch.zeros(padded(shape[0], PANEL), device=self.packed[self._names[0]].device))
        if bias is not None:
            self.bias[: shape[0]] = bias.detach()
        self.adapter = None
        self._native: NativeWeights | None = None

    @property
    def shape(self) -> Shape:
        return self.out_features, self.in_features

    @property
    def packed(self) -> dict[str, Tensor]:
        """The weights in the kernels' layout."""
        return {name: self.get_buffer(f"packed_{name}") for name in self._names}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], float32 or 16 bits -> [..., out] in x's dtype. Raises ValueError for another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {self.in_features}")
        y = select(self.format, device_of(x.device.type), x.numel() // self.in_features).run(self, x)
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)

    def native(self) -> NativeWeights:
        """What the C kernels read, looked up once: decoding calls nothing as often."""
        if self._native is None:
            self._native = NativeWeights(self.format, self.packed, self.shape, self.bias)
        return self._native

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Whatever moves the module goes through here; what is packed is never converted."""
        self._native = None

        def move(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as [out, in]."""
        return self.format.dequantize(self.packed, self.shape, dtype)

    def rows(self, which: Tensor) -> Tensor:
        """Rows of the weights: which [n] -> [n, in] float32. Raises FormatError where the format has no rows apart."""
        return self.format.rows(self.packed, self.shape, which)

    @property
    def weight(self) -> Tensor:
        """`dense`, for modules that read a layer's weights beside calling it."""
        return self.dense()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}"
