"""Any device that torch knows, slowly: what serves where there are no kernels, and what others are measured by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..backend import Backend, LayerSpec
from ..formats.base import Format, QuantizedTensor, Shape
from .linear import TorchLinear
from .storage import TorchKVStorage


class TorchBackend(Backend):
    """Products in tiles of one shape, attention row by row (`ops`): rows depend on each other as little as torch lets.

    What torch does in a product is its own business from version to version and device to device, so exact mode is not
    promised.
    """

    name = "torch"
    native = False

    def linear(
        self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> TorchLinear:
        """See `Backend`."""
        return TorchLinear(self.device, weight, bias, dtype)

    def nbytes(self, format: Format, shape: Shape) -> int:
        """See `Backend`."""
        return format.nbytes(shape)

    def rms_norm(self, weight: Tensor, epsilon: float) -> nn.Module:
        """See `Backend`."""
        return _RMSNorm(weight.to(self.device), epsilon)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Backend`."""
        return ops.rotate(x, cos, sin)

    def silu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Backend`."""
        return ops.silu_gate(gate, up)

    def topk(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if x.dim() != 2 or not 0 < count <= x.shape[1]:
            raise ValueError(f"the top {count} of {tuple(x.shape)}")
        return ops.topk(x, count)

    def kv_storage(
        self, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype = torch.float32
    ) -> TorchKVStorage:
        """See `Backend`."""
        return TorchKVStorage(self.device, layers, n_pages, page_size, dtype)

    def arithmetic(self, dtype: torch.dtype) -> str:
        """See `Backend`."""
        kind = "" if self.device.type == "cpu" else f"-{self.device.type}"
        return f"torch-{torch.__version__}{kind}"

    def exactness_obstacle(self, widths: Sequence[int]) -> str:
        """See `Backend`."""
        if self.device.type == "cpu":
            return "torch computes here, and promises no bits: install a C compiler, as with apt install gcc"
        return f"torch promises no bits on {self.device.type}"

    def free_bytes(self, host: int) -> int:
        """See `Backend`."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return host


class _RMSNorm(nn.Module):
    """See `Backend.rms_norm`."""

    weight: Tensor

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return ops.rms_norm(x, self.weight, self.epsilon)
