"""A linear layer whose result for one row does not depend on the other rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import build as native

PANEL = 32  # columns packed side by side; PANEL of tile.h
_ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 5)
TILE = 16  # rows of one product where there are no native kernels
# Steps of depth that are neighbours in a panel, and the unit that its depth is rounded up to; see linear.h.
_PAIRING = {torch.float32: (1, 1), torch.bfloat16: (2, 32)}


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with float32 sums, each added up in one order that neither other rows nor threads change.

    So a row's bits depend on that row and the weights only. With bfloat16 weights x is rounded to bfloat16 as well:
    products are exact, and `arithmetic` says whose order the sums have. Only the packed weights are kept, on the CPU:
    `panels` is [⌈out / 32⌉, in, 32, 1] in float32, [⌈out / 32⌉, in / 2 rounded up to 16, 32, 2] in bfloat16,
    zero-padded like `bias`. There are no gradients.
    """

    panels: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """weight: [out, in], bias: [out]. dtype: float32 or bfloat16, the weight's own by default.

        Raises TypeError for another dtype, ValueError for another shape.
        """
        super().__init__()
        dtype = dtype or weight.dtype
        if dtype not in _PAIRING:
            raise TypeError(f"weights are float32 or bfloat16, not {dtype}")
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(f"weight {tuple(weight.shape)} and bias do not make a linear layer")
        self.out_features, self.in_features = weight.shape
        pair, unit = _PAIRING[dtype]
        count, padding = -(-self.out_features // PANEL), -self.in_features % unit
        panels = weight.new_zeros(count, (self.in_features + padding) // pair, PANEL, pair, dtype=dtype)
        for panel, rows in zip(panels, weight.detach().split(PANEL), strict=True):
            panel[:, : len(rows)] = F.pad(rows, (0, padding)).view(len(rows), -1, pair).transpose(0, 1)
        padded = torch.zeros(count * PANEL, dtype=torch.float32, device=weight.device)
        if bias is not None:
            padded[: self.out_features] = bias.detach()
        self.register_buffer("panels", panels)
        self.register_buffer("bias", padded)
        self._fixed: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], float32 or bfloat16 -> [..., out] in x's dtype. Raises ValueError for another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {self.in_features}")
        if x.dtype != torch.float32:
            return self.forward(x.float()).to(x.dtype)
        product = native.function("petal_linear", *_ARGUMENTS, returns=ctypes.c_int)
        if product is None:
            return self._tiled(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        if product(y.data_ptr(), x.data_ptr(), *self._fixed_arguments(), rows, native.threads()):
            raise MemoryError(f"no memory to pack {rows} rows of {self.in_features} values")
        return y

    def _fixed_arguments(self) -> tuple[int, ...]:
        """Looked up once: a module's attributes are slow, and decoding calls nothing as often as this."""
        if self._fixed is None:
            half = self.panels.dtype == torch.bfloat16
            self._fixed = (self.panels.data_ptr(), self.bias.data_ptr(), self.in_features, self.out_features, half)
        return self._fixed

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Whatever moves or converts the module goes through here."""
        self._fixed = None
        super()._apply(function, recurse)
        return self

    def _tiled(self, x: Tensor) -> Tensor:
        """The same contract in torch: every product has TILE rows, so its bits do not depend on their number."""
        weights = self.panels.transpose(1, 2).flatten(2).transpose(1, 2).float()
        x = F.pad(x.to(self.panels.dtype).float(), (0, weights.shape[1] - self.in_features))
        y = x.new_empty(len(x), self.out_features)
        for out, rows in zip(y.split(TILE), x.split(TILE), strict=True):
            tile = F.pad(rows, (0, 0, 0, TILE - len(rows)))
            product = torch.matmul(tile, weights).transpose(0, 1).reshape(TILE, -1) + self.bias
            out.copy_(product[: len(rows), : self.out_features])
        return y

    def dense(self) -> Tensor:
        """The weights as [out, in], unpacked."""
        return self.panels.transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features, : self.in_features]

    def rows(self, which: Tensor) -> Tensor:
        """Rows of the weights, unpacked: which [n] -> [n, in] in the weights' dtype."""
        return self.panels[which // PANEL, :, which % PANEL].flatten(1)[:, : self.in_features]

    @property
    def weight(self) -> Tensor:
        """`dense`, for modules that read a layer's weights beside calling it."""
        return self.dense()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.panels.dtype}"


def arithmetic(dtype: torch.dtype) -> str:
    """What computes the products: layers of one dtype agree bit by bit where this is equal."""
    library = native.library()
    if library is None:
        return f"torch-{torch.__version__}"
    return "amx" if dtype == torch.bfloat16 and library.petal_matrix_unit() else "native"
