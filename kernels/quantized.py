"""A linear layer whose weights stay quantized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .formats.base import Format, FormatError, Shape
from .select import select


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in any format; where `adapter` is set, its result for x is added.

    Rows and weights are rounded to bfloat16, products are exact, sums are float32: on a CPU bit for bit what
    `PackedLinear` makes of the dequantized weights in bfloat16. There are no gradients.
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
        self.register_buffer("bias", torch.zeros(shape[0]) if bias is None else bias.detach().float().contiguous())
        self.adapter = None

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
        rows = x.reshape(-1, self.in_features)
        y = select(self.format, x.device, len(rows)).run(self, rows).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.adapter is None else y + self.adapter(x)

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
