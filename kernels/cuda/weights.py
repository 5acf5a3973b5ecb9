"""Weight handles on a card: blobs that products read, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backend import Linear
from ..formats.base import FormatError, QuantizedTensor, padded
from .blobs import BLOB
from .layout import Fields, Weights, dense, dense_rows, fields, interleave, pack
from .layout import beside as joined
from .linear import Linear as Products

_UNITS = 512  # rows of a unit matrix that are multiplied at once


@dataclass(frozen=True)
class Held:
    """Weights that one or several handles read."""

    weights: Weights
    bias: Tensor | None
    """[out] float32."""
    columns: Tensor | slice = field(default_factory=lambda: slice(None))
    """Which of the outputs are a handle's own."""


class CudaLinear(Linear):
    """y = x Wᵀ + b: x is rounded to bfloat16, weights as `src/formats.cuh` says, and y to the dtype of x.

    Tensors stay as the checkpoint has them until they are first needed: `beside` and `interleaved` may come before.
    """

    def __init__(
        self,
        products: Products,
        device: torch.device,
        weight: Tensor | QuantizedTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `Backend.linear`."""
        super().__init__()
        if isinstance(weight, QuantizedTensor):
            weight.format.check(weight.tensors, weight.shape)
            self.label, shape = weight.format.name, weight.shape
            tensors = {name: t.to(device) for name, t in weight.tensors.items()}
            self._source: Tensor | QuantizedTensor | None = replace(weight, tensors=tensors)
        else:
            if (dtype or weight.dtype) not in (torch.float32, torch.bfloat16):
                raise TypeError(f"weights are float32 or bfloat16, not {dtype or weight.dtype}")
            if weight.dim() != 2:
                raise ValueError(f"weight {tuple(weight.shape)} and bias do not make a linear layer")
            self.label, shape = "dense", (weight.shape[0], weight.shape[1])
            self._source = weight.detach().to(device, torch.bfloat16)
        self.out_features, self.in_features = shape
        if bias is not None and bias.shape != shape[:1]:
            raise ValueError(f"a bias of {list(bias.shape)} does not fit {shape[0]} outputs")
        self.products = products
        self._held: Held | None = None
        self.register_buffer("bias", None if bias is None else bias.detach().float().to(device))
        self.adapter = None

    def fields(self) -> Fields:
        """Its tensors taken apart, before they are packed."""
        assert self._source is not None
        if isinstance(self._source, Tensor):
            return dense(self._source)
        return fields(self._source.format, self._source.tensors, self._source.shape)

    @property
    def held(self) -> Held:
        """Packed at first use."""
        if self._held is None:
            weights = pack(self.fields())
            self.products.prepare(weights)
            self.hold(Held(weights, self.bias))
        assert self._held is not None
        return self._held

    @property
    def packed(self) -> Weights:
        """The weights, with those of other handles that share them."""
        return self.held.weights

    def hold(self, held: Held) -> None:
        """From now on the outputs are among those of `held`."""
        self._held, self._source = held, None

    @property
    def nbytes(self) -> int:
        """See `Linear`: its share of what it holds with others."""
        held = self.packed
        return held.nbytes * padded(self.out_features, BLOB) // padded(held.shape[0], BLOB)

    def forward(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {self.in_features}")
        held, wide = self.held, torch.float32 if x.dtype == torch.float32 else torch.bfloat16
        y = self._multiply(held.weights, x.reshape(-1, self.in_features), held.bias, wide)[:, held.columns]
        y = y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Linear`: what products read, by multiplying a unit matrix."""
        return self._dense(self.packed)[self.held.columns].to(dtype)

    def rows(self, which: Tensor) -> Tensor:
        """See `Linear`."""
        columns = self.held.columns
        which = which + (columns.start or 0) if isinstance(columns, slice) else columns[which]
        if self.packed.layout.name == "Bf16":
            return dense_rows(self.packed, which).float()
        return torch.cat([self._some(part) for part in which.split(64)]).float()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.label}"

    def _some(self, which: Tensor) -> Tensor:
        """Rows [n] by multiplying a unit matrix with their blobs."""
        rows = (which % BLOB)[:, None, None].expand(-1, 1, self.in_features)
        return self._dense(self._blobs_of(which // BLOB)).gather(1, rows)[:, 0]

    def _multiply(
        self, weights: Weights, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        y = torch.empty(len(x), weights.shape[0], dtype=dtype, device=weights.blobs.device)
        if len(x):
            packed = self.products.pack(x.to(torch.bfloat16).contiguous(), weights)
            self.products.product(weights, packed, len(x), y, bias=bias, wait=False)
        return y

    def _dense(self, weights: Weights) -> Tensor:
        """[out, in], or [n, 64, in] of chosen blobs."""
        device, width = weights.blobs.device, self.in_features
        columns = []
        for start in range(0, width, _UNITS):
            unit = torch.zeros(min(_UNITS, width - start), width, dtype=torch.bfloat16, device=device)
            unit[:, start : start + len(unit)].fill_diagonal_(1.0)
            columns.append(self._multiply(weights, unit).T)
        matrix = torch.cat(columns, 1)
        return matrix if weights is self.packed else matrix.unflatten(0, (-1, BLOB))

    def _blobs_of(self, which: Tensor) -> Weights:
        """Weights of 64 outputs for each of the chosen blobs [n]."""
        held = self.packed
        scale = None if held.scale is None else held.scale.view(-1, BLOB)[which].flatten()
        shape = (len(which) * BLOB, held.shape[1])
        return Weights(held.layout, shape, held.blobs[which], scale, held.codebooks, held.extension, held.columns)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> CudaLinear:
        """What is packed is never converted or moved: it belongs to its backend."""
        return self


def beside(handles: Sequence[CudaLinear]) -> Held:
    """One product in place of several of the same rows: outputs one after another.

    Raises FormatError where they cannot be joined; then nothing has changed.
    """
    weights = pack(joined([handle.fields() for handle in handles]))
    handles[0].products.prepare(weights)
    bias = None
    if any(handle.bias is not None for handle in handles):
        parts = [h.bias if h.bias is not None else weights.blobs.new_zeros(h.out_features).float() for h in handles]
        bias = torch.cat(parts)
    at = 0
    for handle in handles:
        handle.hold(Held(weights, bias, slice(at, at + handle.out_features)))
        at += handle.out_features
    return Held(weights, bias)


def interleaved(gate: CudaLinear, up: CudaLinear) -> Weights:
    """One product that leaves silu(gate) · up. Raises FormatError as `beside` does."""
    if gate.bias is not None or up.bias is not None:
        raise FormatError("gate and up with biases are two products.")
    both = gate.fields(), up.fields()
    if any(part.codebooks is not None for part in both):
        raise FormatError("gate and up with codebooks of their own are two products.")
    weights = pack(interleave(*both))
    gate.products.prepare(weights, gated=True)
    outputs = torch.arange(gate.out_features, device=weights.blobs.device)
    places = outputs // 8 * 16 + outputs % 8
    gate.hold(Held(weights, None, places))
    up.hold(Held(weights, None, places + 8))
    return weights
