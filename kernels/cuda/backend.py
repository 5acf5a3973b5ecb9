"""NVIDIA cards from compute capability 8.0: own products and attention, whose rows know nothing of each other."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import decode, decode_bf16, encoded
from ..backend import Backend, BatchRunner, Blocks, Forward, KVStorage, LayerSpec
from ..formats.base import Format, QuantizedTensor, Shape
from ..llama import LlamaParts
from .attention import Attention
from .blocks import CudaBlocks, NotWhole
from .elementwise import Elementwise
from .layout import nbytes
from .linear import Linear as Products
from .norm import RMSNorm
from .nvrtc import NvrtcError
from .runner import CudaRunner, Graphs, RowGraphs
from .runtime import OLDEST, runtime
from .scores import CardScores, on_host
from .storage import CudaKVStorage
from .tiling import ROWS
from .weights import CudaLinear

log = logging.getLogger(__name__)


class NoKernels(RuntimeError):
    """Our kernels cannot run on a card; the message is one sentence."""


class CudaBackend(Backend):
    """One card. Hidden states, keys and values are bfloat16, sums float32."""

    name = "cuda"
    native = True
    stream = torch.bfloat16
    kv_dtypes = (torch.bfloat16,)
    dense_dtypes = (torch.bfloat16,)
    weights_share = 0.85
    row_sizes = ROWS

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
        self._graphs = Graphs(self._products, device)

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
        return RMSNorm(self._small, weight.to(self.device), epsilon)

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

    def runner(self, forward: Forward, storage: KVStorage, group_of: Sequence[int]) -> BatchRunner:
        """See `Backend`."""
        assert isinstance(storage, CudaKVStorage)
        return CudaRunner(self._graphs, forward, storage, group_of)

    def blocks(self, parts: Sequence[LlamaParts]) -> Blocks | None:
        """See `Backend`."""
        try:
            return CudaBlocks(self._runtime, parts)
        except NotWhole as error:
            log.info("blocks are computed part by part: %s", error)
            return None

    def rowwise(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """See `Backend`."""
        return RowGraphs(self._graphs, function)

    def decode(self, codec: str, data: bytearray, width: int) -> Tensor:
        """See `Backend`: on the host, from where a batch goes up in one transfer."""
        return decode_bf16(data, width) if codec == "bf16" else decode(codec, data, width).bfloat16()

    def encode(self, codec: str, rows: Tensor) -> memoryview:
        """See `Backend`."""
        array: Any = on_host(encoded(codec, rows)).numpy()
        return memoryview(array).cast("B")

    def scores(self, logits: Tensor) -> Sequence[Any]:
        """See `Backend`: of a greedy draw two numbers a row come over."""
        return CardScores(logits)

    def failure(self) -> str:
        """See `Backend`: a card that is lost, or has failed, refuses whatever is asked of it."""
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).cpu()
        except torch.OutOfMemoryError:
            return ""
        except RuntimeError as error:
            return f"the device {self.device} fails: {str(error).splitlines()[0]}"
        return ""

    def arithmetic(self, dtype: torch.dtype) -> str:
        """See `Backend`: whatever `dtype`, factors are bfloat16; a matrix unit's order of sums is its generation's."""
        major, minor = self._runtime.card.capability
        return f"sm{major}{minor}"

    def exactness_obstacle(self, widths: Sequence[int]) -> str:
        """See `Backend`."""
        return ""

    def free_bytes(self, host: int) -> int:
        """See `Backend`: what the card has free, or less where this process may fill but a share of it."""
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, min(free, int(total * self.memory_share) - torch.cuda.memory_reserved(self.device)))
