"""Weight handles in plain torch: matrices stay as checkpoints have them and are made dense for each product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..backend import Linear
from ..formats.base import QuantizedTensor


class TorchLinear(Linear):
    """y = x Wᵀ + b by `ops.linear`: quantized weights are rounded to bfloat16, as is x beside them."""

    def __init__(
        self,
        device: torch.device,
        weight: Tensor | QuantizedTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `Backend.linear`."""
        super().__init__()
        self.format = weight.format if isinstance(weight, QuantizedTensor) else None
        if isinstance(weight, QuantizedTensor):
            weight.format.check(weight.tensors, weight.shape)
            tensors, shape = dict(weight.tensors), weight.shape
        else:
            dtype = dtype or weight.dtype
            if dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"weights are float32 or bfloat16, not {dtype}")
            if weight.dim() != 2:
                raise ValueError(f"weight {tuple(weight.shape)} and bias do not make a linear layer")
            tensors, shape = {"weight": weight.detach().to(dtype)}, (weight.shape[0], weight.shape[1])
        self.out_features, self.in_features = shape
        if bias is not None and bias.shape != shape[:1]:
            raise ValueError(f"a bias of {list(bias.shape)} does not fit {shape[0]} outputs")
        for name, tensor in tensors.items():
            self.register_buffer(f"packed_{name}", tensor.to(device))
        self.register_buffer("bias", None if bias is None else bias.detach().float().to(device))
        self.adapter = None

    @property
    def packed(self) -> dict[str, Tensor]:
        """The weights as the checkpoint has them."""
        return {name.removeprefix("packed_"): t for name, t in self.named_buffers() if name.startswith("packed_")}

    @property
    def nbytes(self) -> int:
        """See `Linear`."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def forward(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {self.in_features}")
        weight = self.packed["weight"] if self.format is None else self.dense().bfloat16()
        y = ops.linear(x.reshape(-1, self.in_features).float(), weight, self.bias)
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Linear`."""
        return self.packed["weight"].to(dtype) if self.format is None else self._matrix().dense(dtype)

    def rows(self, which: Tensor) -> Tensor:
        """See `Linear`."""
        return self.packed["weight"][which].float() if self.format is None else self._matrix().rows(which)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name if self.format else 'dense'}"

    def _matrix(self) -> QuantizedTensor:
        assert self.format is not None
        return QuantizedTensor(self.format, self.packed, (self.out_features, self.in_features))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchLinear:
        """What is packed is never converted or moved: it belongs to its backend."""
        return self
