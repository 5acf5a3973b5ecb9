"""What computes on one kind of device: one object, chosen once for a span, that all above it asks.

Nothing above knows a device. A backend owns

- weights: `linear` lays a matrix out as its products want it (canonical formats in, a weight handle out), `nbytes`
  says what that will take, `embedding` looks rows up;
- operations: products are the handles', attention is the KV storage's, the rest are methods here;
- memory of sequences: `kv_storage` makes it; which page is whose is bookkeeping elsewhere, in plain numbers;
- forwards: `runner` turns a planned batch into hidden states. It may run a model's forward as it comes, or keep static
  buffers for a few padded numbers of rows and replay what it captured; whoever calls it cannot tell;
- both ends of a hop: `decode` and `encode` stand between bytes of the wire and rows on the device, `scores` between
  logits on the device and a draw on the host;
- facts: arithmetic name, whether exact mode can hold, threads, memory for weights.

**A row's result never depends on other rows**: not on their number, order, tree or pages. Where a backend cannot keep
to that it says so in `exactness_obstacle`.

To add one: subclass `Backend`, and name it in `registry`. Nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .activations import HostRows, decode, encode
from .formats.base import Format, QuantizedTensor, Shape
from .llama import LlamaParts
from .metadata import AttentionMetadata, BatchPlan


@dataclass(frozen=True)
class LayerSpec:
    """What one layer asks of the KV cache."""

    kv_heads: int
    key_width: int
    value_width: int
    window: int | None


class Attend(Protocol):
    """query [N, heads, width], key and value [N, kv_heads, width] of the ragged row -> [N, heads, value_width].

    Stores key and value first. `layer` counts the span's blocks from 0. Query head h reads kv head
    h // (heads / kv_heads). window: a row at position p sees positions above p - window only. softcap: scores become
    cap * tanh(score / cap). sinks: [heads] float32, one more logit per head, in the denominator only.
    """

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class Forward(Protocol):
    """A span: token ids [N] or hidden states [N, d], positions int64 [N] -> hidden states [N, d] behind `blocks`."""

    def __call__(self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range) -> Tensor: ...


class Blocks(Protocol):
    """Blocks of the Llama kind, computed whole: hidden states [N, d], angles, the span's layers to apply -> [N, d].

    angles: cosines and sines, float32 [N, width]. attend: of the backend's own storage, whose windows hold.
    """

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, layers: range) -> Tensor: ...


class Linear(nn.Module, ABC):
    """A weight handle: y = x Wᵀ + b with W laid out as the device wants it; an adapter's result for x is added.

    There are no gradients, and converting the module leaves its weights alone.
    """

    out_features: int
    in_features: int
    bias: Tensor | None
    """[out] float32."""
    adapter: nn.Module | None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], float32 or 16 bits -> [..., out] in x's dtype. Raises ValueError for another width."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as [out, in]."""

    @abstractmethod
    def rows(self, which: Tensor) -> Tensor:
        """Rows of the weights: which [n] -> [n, in] float32. Raises FormatError where the format has no rows apart."""

    @property
    def weight(self) -> Tensor:
        """`dense`, for modules that read a layer's weights beside calling it."""
        return self.dense()


class Embedding(nn.Module):
    """Token embeddings: rows of a weight handle, such as an LM head that they are tied to, times `scale`."""

    def __init__(self, matrix: Linear, scale: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.scale = matrix, scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape -> [*ids, d] float32."""
        rows = self.matrix.rows(ids.reshape(-1)).view(*ids.shape, -1)
        return rows if self.scale == 1 else rows * self.scale


class KVStorage(ABC):
    """Keys and values of a span's layers: pages of so many rows each, zeroed. A place is page * page_size + offset."""

    layers: Sequence[LayerSpec]
    n_pages: int
    page_size: int

    @property
    @abstractmethod
    def page_nbytes(self) -> int:
        """Bytes of one page of all layers."""

    @abstractmethod
    def attention(self, metadata: Sequence[AttentionMetadata]) -> Attend:
        """Attention of one forward; metadata by layer.

        The function raises ValueError for tensors that do not fit or rows that are no tree, IndexError for a slot
        without a page, MemoryError; where a device cannot tell in time, what it would refuse touches no other rows.
        """

    @abstractmethod
    def copy_page(self, layers: Sequence[int], source: int, target: int) -> None:
        """Copy one page of some layers: a shared page is about to be written."""

    @abstractmethod
    def move(self, layers: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """In all of `layers` at once move rows between places, as if all were read before any is written.

        Raises IndexError for a place outside the storage.
        """

    @abstractmethod
    def read(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at places of any shape: [*places, kv_heads, width] float32."""

    @abstractmethod
    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, as `read` gives them."""

    @abstractmethod
    def grow(self, n_pages: int) -> None:
        """Have more pages; rows stay where they are."""


@dataclass(frozen=True)
class Batch:
    """One forward: token ids [N] or hidden states [N, d], on the host or not, where they lie, the blocks to apply."""

    rows: Tensor
    plan: BatchPlan
    blocks: range


class BatchRunner(Protocol):
    """Runs batches through one span and one storage."""

    def run(self, batch: Batch) -> Tensor:
        """Hidden states [N, d] behind the batch's last block, the caller's own; their keys and values are stored."""


class Backend(ABC):
    """See the module. `device` is where its tensors live, `threads` how many of the host it may use."""

    name: ClassVar[str]
    native: ClassVar[bool]
    """Whether products read quantized weights as they are: else dense ones are faster, where they fit."""
    stream: torch.dtype = torch.float32
    """Of hidden states between blocks."""
    kv_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    dense_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Of dense weights; the first where nobody says."""
    weights_share: float = 0.6
    """Of the memory that is free: the rest is for the cache, activations and whoever else is at the machine."""
    memory_share = 1.0
    """Of a device's own memory, what this process may fill."""
    row_sizes: tuple[int, ...] = ()
    """Numbers of rows that a forward is padded to, where it is; each costs time when it first comes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.threads = torch.get_num_threads()

    # Weights.

    @abstractmethod
    def linear(
        self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Linear:
        """A matrix [out, in], dense or in any format, and a bias [out] as a weight handle.

        dtype: float32 or bfloat16, of dense weights, their own by default. Raises FormatError for tensors that do not
        fit, TypeError for another dtype, ValueError for another shape.
        """

    @abstractmethod
    def nbytes(self, format: Format, shape: Shape) -> int:
        """Bytes of a handle's weights in this format; where outliers count, without them."""

    # Operations that are neither products nor attention.

    @abstractmethod
    def rms_norm(self, weight: Tensor, epsilon: float) -> nn.Module:
        """y = weight * x / sqrt(mean(x²) + epsilon) over the last axis: [..., width] -> the same shape."""

    @abstractmethod
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the heads of x [N, heads, width], side by side, by angles [N, width], in place. Returns x."""

    @abstractmethod
    def silu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, of one shape."""

    @abstractmethod
    def topk(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """x [n, width] float32 -> its largest `count` values and their columns, [n, count] each.

        Largest first; among equals the lower column. Raises ValueError for another shape or count.
        """

    # Sequences and forwards.

    @abstractmethod
    def kv_storage(
        self, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype = torch.float32
    ) -> KVStorage:
        """Memory for keys and values, taken at once, so that nothing runs out of it later. Raises MemoryError.

        dtype: one of `kv_dtypes`.
        """

    def runner(self, forward: Forward, storage: KVStorage, group_of: Sequence[int]) -> BatchRunner:
        """What runs a span's batches; group_of: which of a plan's page tables a layer reads."""
        return EagerRunner(self, forward, storage, group_of)

    def blocks(self, parts: Sequence[LlamaParts]) -> Blocks | None:
        """Blocks of the Llama kind computed whole; None where they go part by part.

        Handles of the parts may share memory from then on, and go on to work.
        """
        return None

    def rowwise(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function of rows [n, d] on the device -> [n, m], each row by itself; it may be captured and replayed."""
        return function

    # Both ends of a hop.

    def decode(self, codec: str, data: bytearray, width: int) -> Tensor:
        """Activations as they came -> rows [n, width] in the stream's dtype, for a batch.

        They may lie on `data`. Raises ActivationError for a wrong length or values that are not finite.
        """
        return decode(codec, data, width).to(self.device, self.stream)

    def encode(self, codec: str, rows: Tensor) -> memoryview:
        """Rows [n, d] as they leave, in host memory that nothing else writes; waiting releases the interpreter."""
        return encode(codec, rows)

    def scores(self, logits: Tensor) -> Sequence[Any]:
        """Logits [n, vocab] as a sampler on the host reads them: indexed by row, a float32 numpy array [vocab] each.

        Where that costs a transfer, what is not asked for need not make it: a row may be anything that has the array's
        `argmax`, `max`, `astype` and `tobytes`.
        """
        rows: Any = logits.float().numpy() if logits.is_cpu else HostRows(list(logits))
        return rows

    # Facts.

    def failure(self) -> str:
        """Why the device computes nothing any more, in a few words; empty while it does. It is asked after an error."""
        return ""

    @abstractmethod
    def arithmetic(self, dtype: torch.dtype) -> str:
        """Who computes the products: handles whose factors are rounded to `dtype` agree bit by bit where this does."""

    def in_arithmetic(self, name: str, dtype: torch.dtype) -> Backend | None:
        """This device with products of such an arithmetic, where it has kernels of that one too."""
        return self if self.arithmetic(dtype) == name else None

    @abstractmethod
    def exactness_obstacle(self, widths: Sequence[int]) -> str:
        """Why rows of a model with layers so wide may have other bits in other batches; empty where they do not."""

    def free_bytes(self, host: int) -> int:
        """Memory that weights may take, where programs on this machine can still have `host` bytes."""
        return host


class EagerRunner:
    """Runs a forward as it comes."""

    def __init__(self, backend: Backend, forward: Forward, storage: KVStorage, group_of: Sequence[int]) -> None:
        self._device = backend.device
        self._forward, self._storage, self._group_of = forward, storage, group_of

    def run(self, batch: Batch) -> Tensor:
        """See `BatchRunner`."""
        groups = batch.plan.metadata(self._device)
        attend = self._storage.attention([groups[g] for g in self._group_of])
        positions = groups[0].positions
        if batch.plan.stored:
            positions = torch.cat([positions[start:stop] for start, stop in batch.plan.asked])
        return self._forward(batch.rows.to(self._device), positions.long(), attend, batch.blocks)
