"""A linear layer whose result for one row does not depend on the other rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Linear
from ..formats.base import Shape, padded
from .library import Library

PANEL = 32  # columns packed side by side; PANEL of tile.h
# Steps of depth that are neighbours in a panel, and the unit that its depth is rounded up to; see linear.h.
_PAIRING = {torch.float32: (1, 1), torch.bfloat16: (2, 32)}


class PackedLinear(Linear):
    """y = x Wᵀ + b with float32 sums, each added up in one order that neither other rows nor threads change.

    So a row's bits depend on that row and the weights only. With bfloat16 weights x is rounded to bfloat16 as well:
    products are exact, and the backend's `arithmetic` says whose order the sums have. Only the packed weights are kept:
    `panels` is [⌈out / 32⌉, in, 32, 1] in float32, [⌈out / 32⌉, in / 2 rounded up to 16, 32, 2] in bfloat16,
    zero-padded like the bias.
    """

    panels: Tensor

    def __init__(
        self, library: Library, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """weight: [out, in], bias: [out]. dtype: float32 or bfloat16, the weight's own by default.

        Raises TypeError for another dtype, ValueError for another shape.
        """
        super().__init__()
        dtype = dtype or weight.dtype
        if dtype not in _PAIRING:
            raise TypeError(f"weights are float32 or bfloat16, not {dtype}")
        if weight.dim() != 2:
            raise ValueError(f"weight {tuple(weight.shape)} and bias do not make a linear layer")
        self.out_features, self.in_features = weight.shape
        pair, unit = _PAIRING[dtype]
        count, padding = -(-self.out_features // PANEL), -self.in_features % unit
        panels = weight.new_zeros(count, (self.in_features + padding) // pair, PANEL, pair, dtype=dtype)
        for panel, rows in zip(panels, weight.detach().split(PANEL), strict=True):
            panel[:, : len(rows)] = F.pad(rows, (0, padding)).view(len(rows), -1, pair).transpose(0, 1)
        shown, whole_bias = biases(bias, self.out_features)
        self.register_buffer("panels", panels)
        self.register_buffer("bias", shown)
        self.adapter, self._library, self._bias = None, library, whole_bias
        half = dtype == torch.bfloat16
        # Looked up once: decoding calls nothing as often as this.
        self._weights = (panels.data_ptr(), whole_bias.data_ptr(), self.in_features, self.out_features, half)

    @property
    def nbytes(self) -> int:
        """See `Linear`."""
        return self.panels.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """See `Linear`. Raises MemoryError."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {self.in_features}")
        if x.dtype != torch.float32:
            return self.forward(x.float()).to(x.dtype)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        library = self._library
        if library.linear(y.data_ptr(), x.data_ptr(), *self._weights, rows, library.threads):
            raise MemoryError(f"no memory to pack {rows} rows of {self.in_features} values")
        return y if self.adapter is None else y + self.adapter(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Linear`."""
        whole = self.panels.transpose(1, 2).flatten(2).flatten(0, 1)
        return whole[: self.out_features, : self.in_features].to(dtype)

    def rows(self, which: Tensor) -> Tensor:
        """See `Linear`."""
        return self.panels[which // PANEL, :, which % PANEL].flatten(1)[:, : self.in_features].float()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.panels.dtype}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """What is packed is never converted or moved: it belongs to its backend."""
        return self


def panel_nbytes(dtype: torch.dtype, shape: Shape) -> int:
    """Bytes of the panels of a matrix (out, in)."""
    return padded(shape[0], PANEL) * padded(shape[1], _PAIRING[dtype][1]) * dtype.itemsize


def biases(bias: Tensor | None, out: int) -> tuple[Tensor | None, Tensor]:
    """[out] or None, as a layer was given it, and what C reads: whole panels, zeros where there is none.

    Raises ValueError for another shape.
    """
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"a bias of {list(bias.shape)} does not fit {out} outputs")
    whole = torch.zeros(padded(out, PANEL))
    if bias is None:
        return None, whole
    whole[:out] = bias.detach()
    return whole[:out], whole
