"""NVIDIA cards from compute capability 8.0: own products and attention, whose rows know nothing of each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..backend import Backend, BatchRunner, EagerRunner, Forward, KVStorage, LayerSpec
from ..formats.base import Format, QuantizedTensor, Shape
from ..metadata import AttentionMetadata, BatchPlan
from .attention import Attention
from .elementwise import MOST_NORMED, Elementwise
from .layout import nbytes
from .linear import Linear as Products
from .nvrtc import NvrtcError
from .runner import CudaRunner, uploaded
from .runtime import OLDEST, runtime
from .storage import CudaKVStorage
from .weights import CudaLinear


class NoKernels(RuntimeError):
    """Our kernels cannot run on a card; the message is one sentence."""


class CudaBackend(Backend):
    """One card. Hidden states, keys and values are bfloat16, sums float32."""

    name = "cuda"
    native = True
    stream = torch.bfloat16
    kv_dtypes = (torch.bfloat16,)

    def __init__(self, device: torch.device) -> None:
        """Raises NoKernels."""
        super().__init__(device)
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            raise NoKernels(f"kernels need compute capability 8.0, this card has {capability[0]}.{capability[1]}")
        if importlib.util.find_spec("triton") is None:
            raise NoKernels("attention needs Triton, which is not installed")
        try:
            self._runtime = runtime(device)
        except NvrtcError as error:
            raise NoKernels(str(error).rstrip(".")) from error
        self._products, self._attention = Products(self._runtime), Attention(self._runtime)
        self._small = Elementwise(self._runtime)

    def linear(
        self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> CudaLinear:
        """See `Backend`."""
        return CudaLinear(self._products, self.device, weight, bias, dtype)

    def nbytes(self, format: Format, shape: Shape) -> int:
        """See `Backend`."""
        return nbytes(format, shape)

    def rms_norm(self, weight: Tensor, epsilon: float) -> nn.Module:
        """See `Backend`."""
        return _RMSNorm(self._small, weight.to(self.device), epsilon)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Backend`."""
        if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[2] % 4:
            return ops.rotate(x, cos, sin)
        return self._small.rotate(x, cos.float().contiguous(), sin.float().contiguous())

    def silu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Backend`."""
        plain = all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in (gate, up))
        return self._small.gate(gate, up) if plain and gate.numel() % 2 == 0 else ops.silu_gate(gate, up)

    def topk(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if x.dim() != 2 or not 0 < count <= x.shape[1]:
            raise ValueError(f"the top {count} of {tuple(x.shape)}")
        return ops.topk(x, count)

    def kv_storage(
        self, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype = torch.bfloat16
    ) -> CudaKVStorage:
        """See `Backend`."""
        if dtype not in self.kv_dtypes:
            raise ValueError(f"a card keeps keys and values in bfloat16, not {dtype}")
        return CudaKVStorage(self._attention, self._small, self.device, layers, n_pages, page_size)

    def metadata(self, plan: BatchPlan) -> list[AttentionMetadata]:
        """See `Backend`."""
        return uploaded(plan, self.device)

    def runner(self, forward: Forward, storage: KVStorage, group_of: Sequence[int]) -> BatchRunner:
        """See `Backend`."""
        assert isinstance(storage, CudaKVStorage)
        eager = EagerRunner(self, forward, storage, group_of)
        return CudaRunner(eager, self._products, forward, storage, group_of)

    def arithmetic(self, dtype: torch.dtype) -> str:
        """See `Backend`: whatever `dtype`, factors are bfloat16; a matrix unit's order of sums is its generation's."""
        major, minor = self._runtime.card.capability
        return f"bf16/sm{major}{minor}"

    def exactness_obstacle(self, widths: Sequence[int]) -> str:
        """See `Backend`."""
        return ""

    def free_bytes(self, host: int) -> int:
        """See `Backend`."""
        return torch.cuda.mem_get_info(self.device)[0]


class _RMSNorm(nn.Module):
    """See `Backend.rms_norm`."""

    weight: Tensor

    def __init__(self, small: Elementwise, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self._small, self.epsilon = small, epsilon
        self._plain = len(weight) % 8 == 0 and len(weight) <= MOST_NORMED
        self._float = weight.float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        if not self._plain or x.dtype != torch.bfloat16 or not x.is_contiguous():
            return ops.rms_norm(x.float(), self._float, self.epsilon).to(x.dtype)
        rows = x.view(-1, x.shape[-1])
        return self._small.norm(rows, self._float, self.epsilon, torch.empty_like(rows)).view(x.shape)
