"""Forwards on a card: captured once for a few sizes, replayed for every batch that fits one of them.

A batch's numbers go up in one transfer into buffers that stay where they are; rows are padded to a size, and padding
writes nowhere. What is no such batch (a long prefill, a forward that cannot be captured) runs as it comes, through the
same kernels: a row's bits are the same either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..backend import Batch, EagerRunner, Forward
from ..metadata import AttentionMetadata, BatchPlan
from .attention import Extent
from .linear import Linear as Products
from .storage import CudaKVStorage, Prepared

log = logging.getLogger(__name__)

ROWS = (8, 16, 32, 64, 128, 256)
CONTEXTS = (1024, 8192, 32768)
_WIDEST = (1, 4, 32)


@dataclass(frozen=True)
class Size:
    """What a graph is made for."""

    rows: int
    segments: int
    context: int
    widest: int
    tables: int
    page_size: int

    @classmethod
    def of(cls, plan: BatchPlan) -> Size | None:
        """The smallest that holds a plan; None where none does."""
        counts = plan.counts
        longest = max((base + count for base, count in zip(plan.bases, counts, strict=True)), default=0)
        rows = next((size for size in ROWS if len(plan.positions) <= size), None)
        context = next((size for size in CONTEXTS if longest <= size), None)
        if rows is None or context is None or not counts:
            return None
        widest = next((size for size in _WIDEST if max(counts) <= size), rows)
        return cls(rows, 1 if len(counts) == 1 else rows, context, min(widest, rows), len(plan.tables), plan.page_size)

    @classmethod
    def exactly(cls, plan: BatchPlan) -> Size:
        """A plan's own size."""
        longest = max((base + count for base, count in zip(plan.bases, plan.counts, strict=True)), default=0)
        rows, widest = len(plan.positions), max(plan.counts, default=1)
        return cls(rows, len(plan.counts), longest, widest, len(plan.tables), plan.page_size)

    @property
    def table_width(self) -> int:
        return max(1, -(-self.context // self.page_size))

    @property
    def numbers(self) -> int:
        return 3 * self.segments + 2 * self.rows + self.tables * self.segments * self.table_width

    def flat(self, plan: BatchPlan) -> list[int]:
        """A plan's numbers, padded: segments without rows behind the last, rows of no segment, pages that are none."""
        starts = list(accumulate(plan.counts, initial=0))[:-1]
        flat: list[int] = []
        for values in (starts, plan.counts, plan.bases):
            flat += [*values, *[0] * (self.segments - len(values))]
        for values in (plan.positions, plan.parents):
            flat += [*values, *[0] * (self.rows - len(values))]
        for group in plan.tables:
            for table in group:
                flat += [*table[: self.table_width], *[-1] * (self.table_width - len(table))]
            flat += [-1] * (self.table_width * (self.segments - len(group)))
        return flat

    def metadata(self, flat: Tensor) -> list[AttentionMetadata]:
        """Views of a device's flat numbers, one for each group of layers."""
        s, n, width = self.segments, self.rows, self.table_width
        start, count, base, place, parent, tables = flat.split([s, s, s, n, n, self.tables * s * width])
        prepared = Prepared(Extent(n, s, self.context, n, self.widest))
        found = []
        for table in tables.view(self.tables, s, width):
            one = AttentionMetadata(start, count, base, place, parent, table, self.page_size)
            one.prepared = prepared
            found.append(one)
        return found


def uploaded(plan: BatchPlan, device: torch.device) -> list[AttentionMetadata]:
    """A plan on the card in one transfer that nobody waits for."""
    size = Size.exactly(plan)
    flat = torch.tensor(size.flat(plan), dtype=torch.int32, pin_memory=True)
    return size.metadata(flat.to(device, non_blocking=True))


class Captured:
    """One forward of one size as a graph, with the buffers that it reads and writes."""

    def __init__(
        self,
        size: Size,
        batch: Batch,
        products: Products,
        forward: Forward,
        storage: CudaKVStorage,
        group_of: Sequence[int],
    ) -> None:
        """Raises RuntimeError where the forward cannot be captured."""
        self._size = size
        device = batch.rows.device
        self._flat = torch.zeros(size.numbers, dtype=torch.int32, device=device)
        self._rows = torch.zeros(size.rows, *batch.rows.shape[1:], dtype=batch.rows.dtype, device=device)
        self._load(batch)

        def run() -> Tensor:
            metadata = size.metadata(self._flat)  # planned anew each time, so that the graph plans, too
            attend = storage.attention([metadata[g] for g in group_of])
            return forward(self._rows, metadata[0].positions.long(), attend, batch.blocks)

        with products.patience():
            self._capture(run, device)

    def _capture(self, run: Callable[[], Tensor], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()  # compiles, and takes the memory that lasts
            with _no_waiting():
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = run()

    def __call__(self, batch: Batch) -> Tensor:
        self._load(batch)
        self._graph.replay()
        return self._out[: len(batch.rows)].clone()

    def _load(self, batch: Batch) -> None:
        numbers = torch.tensor(self._size.flat(batch.plan), dtype=torch.int32, pin_memory=True)
        self._flat.copy_(numbers, non_blocking=True)
        self._rows[: len(batch.rows)].copy_(batch.rows, non_blocking=True)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raises RuntimeError where the host waits for the card: a capture that fails would leave torch's state broken."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CudaRunner:
    """Runs a span's batches: graphs where they fit, else as they come."""

    def __init__(
        self,
        eager: EagerRunner,
        products: Products,
        forward: Forward,
        storage: CudaKVStorage,
        group_of: Sequence[int],
    ) -> None:
        self._eager, self._products = eager, products
        self._forward, self._storage, self._group_of = forward, storage, group_of
        self._graphs: dict[tuple[object, ...], Captured] = {}
        self._pages = storage.n_pages
        self._capturable = True

    def run(self, batch: Batch) -> Tensor:
        """See `BatchRunner`."""
        size = Size.of(batch.plan) if self._capturable else None
        if size is None:
            return self._eager.run(batch)
        if self._storage.n_pages != self._pages:
            self._graphs.clear()
            self._pages = self._storage.n_pages
        key = (size, batch.blocks.start, batch.blocks.stop, batch.rows.dtype, batch.rows.shape[1:])
        if key not in self._graphs:
            try:
                self._graphs[key] = Captured(size, batch, self._products, self._forward, self._storage, self._group_of)
            except RuntimeError as error:
                log.warning("this model runs without captured graphs: %s", str(error).splitlines()[0])
                self._capturable = False
                torch.cuda.synchronize(batch.rows.device)
                return self._eager.run(batch)
        return self._graphs[key](batch)
