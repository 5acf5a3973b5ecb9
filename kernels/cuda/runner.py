"""Forwards on a card: captured once for a few sizes, replayed for every batch that fits one of them.

A batch's numbers go up in one transfer into buffers that stay where they are; rows are padded to a size, and padding
writes nowhere. What is no such batch (a long prefill, a forward that cannot be captured) runs as it comes, through the
same kernels: a row's bits are the same either way.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from ..backend import Batch, Forward
from ..metadata import AttentionMetadata, BatchPlan
from ..slow_work import slow_work
from .attention import Extent
from .linear import Linear as Products
from .storage import CudaKVStorage, Prepared
from .tiling import ROWS

log = logging.getLogger(__name__)

CAPTURE_S = 120.0  # seconds that a capture may take, compiling included
CONTEXTS = (1024, 8192, 32768)
_WIDEST = (1, 4, 32)
_LISTED = (64, 256, 1024, 2048)
_NONE = array("i", [-1])
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Size:
    """What a graph is made for."""

    rows: int
    """Rows that ask."""
    listed: int
    """Rows of trees, with those that an earlier forward stored."""
    segments: int
    context: int
    widest: int
    tables: int
    page_size: int
    stored: bool = False

    @classmethod
    def of(cls, plan: BatchPlan) -> Size | None:
        """The smallest that holds a plan; None where none does."""
        exact = cls.exactly(plan)
        rows = next((size for size in ROWS if exact.rows <= size), None)
        context = next((size for size in CONTEXTS if exact.context <= size), None)
        listed = rows if not exact.stored else next((size for size in _LISTED if exact.listed <= size), None)
        if rows is None or context is None or listed is None or not plan.counts:
            return None
        widest = next((size for size in _WIDEST if exact.widest <= size), rows)
        segments = 1 if exact.segments == 1 else rows
        return replace(exact, rows=rows, listed=listed, segments=segments, context=context, widest=min(widest, rows))

    @classmethod
    def exactly(cls, plan: BatchPlan) -> Size:
        """A plan's own size."""
        longest = max((base + count for base, count in zip(plan.bases, plan.counts, strict=True)), default=0)
        widest = max((stop - start for start, stop in plan.asked), default=1)
        listed, stored = len(plan.positions), bool(plan.stored)
        return cls(plan.asking, listed, len(plan.counts), longest, widest, len(plan.tables), plan.page_size, stored)

    @property
    def table_width(self) -> int:
        return max(1, -(-self.context // self.page_size))

    @property
    def parts(self) -> list[int]:
        """Lengths: rows' start, count, base, stored of segments; positions that ask; all positions, parents; pages."""
        s = self.segments
        return [s, s, s, s, self.rows, self.listed, self.listed, self.tables * s * self.table_width]

    @property
    def numbers(self) -> int:
        return sum(self.parts)

    def flat(self, plan: BatchPlan) -> array[int]:
        """A plan's numbers, padded."""
        flat = array("i", bytes(4 * self.numbers))
        self.write(plan, memoryview(flat))
        return flat

    def write(self, plan: BatchPlan, into: memoryview) -> None:
        """`flat`, in place: segments without rows behind the last, rows of no segment, pages that are none."""
        places = list(accumulate(self.parts, initial=0))
        first, width = places[-2], self.table_width
        into[:first] = array("i", bytes(4 * first))
        into[first:] = _NONE * (len(into) - first)
        starts = list(accumulate(plan.counts, initial=0))[:-1]
        asking = plan.asking_positions if plan.stored else plan.positions
        values = (starts, plan.counts, plan.bases, plan.stored, asking, plan.positions, plan.parents)
        pages = (
            (first + (g * self.segments + i) * width, table[:width])
            for g, group in enumerate(plan.tables)
            for i, table in enumerate(group)
        )
        for at, numbers in chain(zip(places, values, strict=False), pages):
            into[at : at + len(numbers)] = array("i", numbers)

    def metadata(self, flat: Tensor) -> list[AttentionMetadata]:
        """Views of a device's flat numbers, one for each group of layers."""
        start, count, base, kept, _, place, parent, tables = flat.split(self.parts)
        prepared = Prepared(Extent(self.rows, self.segments, self.context, self.listed, self.widest))
        found = []
        for table in tables.view(self.tables, self.segments, self.table_width):
            stored = kept if self.stored else None
            one = AttentionMetadata(start, count, base, place, parent, table, self.page_size, stored)
            one.prepared = prepared
            found.append(one)
        return found

    def positions(self, flat: Tensor) -> Tensor:
        """Of the rows that ask, int64."""
        return flat.split(self.parts)[4].long()


class Staging:
    """What a forward reads, numbers and rows, in memory of the card that one transfer fills.

    Two buffers of the host take turns, so that one may be written while the other is still on its way.
    """

    def __init__(self, size: Size, rows: Tensor, device: torch.device) -> None:
        """rows: any of the batches', for width and dtype."""
        row_bytes = rows[:1].nbytes
        self._size, self._start = size, -(-4 * size.numbers // 256) * 256
        nbytes = self._start + size.rows * row_bytes
        self._hosts = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in self._hosts]
        self._turn = 0
        self._held = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.flat = self._held[: 4 * size.numbers].view(torch.int32)
        self.rows = self._held[self._start :].view(rows.dtype).view(size.rows, *rows.shape[1:])

    def send(self, batch: Batch) -> None:
        """On the current stream. Nobody waits, but for a buffer whose transfer is two batches old."""
        self._turn ^= 1
        host, sent, rows = self._hosts[self._turn], self._sent[self._turn], batch.rows
        sent.synchronize()
        numbers: Any = host[: 4 * self._size.numbers].numpy()
        self._size.write(batch.plan, memoryview(numbers).cast("i"))
        end = self._start
        if rows.is_cpu:
            end += rows.nbytes
            host[self._start : end].view(rows.dtype).view(rows.shape).copy_(rows)
        self._held[:end].copy_(host[:end], non_blocking=True)
        sent.record()
        if not rows.is_cpu:
            self.rows[: len(rows)].copy_(rows)


class Graphs:
    """Captured functions of one card; they share memory, since they never run side by side."""

    def __init__(self, products: Products, device: torch.device) -> None:
        self._products, self._device = products, device
        self._pool = torch.cuda.graph_pool_handle()
        # Memory that no graph uses any more is gone for good: one graph always does.
        self._first = torch.cuda.CUDAGraph()
        first = torch.cuda.graph(self._first, pool=self._pool, capture_error_mode="thread_local")
        with _CAPTURING, torch.cuda.device(device), first:
            self._kept = torch.zeros(1, device=device)

    def capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `run`, and where its result lies. Raises RuntimeError where it cannot be captured."""
        # Others of this process may compute and wait meanwhile, but not capture.
        with slow_work(CAPTURE_S), self._products.patience(), _CAPTURING:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                run()  # compiles, and takes the memory that lasts
                with _no_waiting():
                    run()
            torch.cuda.current_stream(self._device).wait_stream(stream)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        return graph, out


class Captured:
    """One forward of one size as a graph, with the buffers that it reads and writes."""

    def __init__(
        self,
        size: Size,
        batch: Batch,
        graphs: Graphs,
        forward: Forward,
        storage: CudaKVStorage,
        group_of: Sequence[int],
    ) -> None:
        """Raises RuntimeError where the forward cannot be captured."""
        self._staging = staging = Staging(size, batch.rows, storage.device)
        staging.send(batch)

        def run() -> Tensor:
            metadata = size.metadata(staging.flat)  # planned anew each time, so that the graph plans, too
            attend = storage.attention([metadata[g] for g in group_of])
            return forward(staging.rows, size.positions(staging.flat), attend, batch.blocks)

        self._graph, self._out = graphs.capture(run)

    def __call__(self, batch: Batch) -> Tensor:
        self._staging.send(batch)
        self._graph.replay()
        return self._out[: len(batch.rows)].clone()


class RowGraphs:
    """A function of rows, each by itself, as graphs for a few numbers of rows."""

    def __init__(self, graphs: Graphs, function: Callable[[Tensor], Tensor]) -> None:
        self._graphs, self._function = graphs, function
        self._captured: dict[tuple[object, ...], tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}
        self._capturable = True

    def __call__(self, rows: Tensor) -> Tensor:
        size = next((size for size in ROWS if len(rows) <= size), None)
        if size is None or not self._capturable:
            return self._function(rows)
        key = (size, rows.dtype, rows.shape[1:])
        if key not in self._captured:
            static = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            try:
                self._captured[key] = (static, *self._graphs.capture(lambda: self._function(static)))
            except torch.OutOfMemoryError:
                raise  # there may be memory again
            except RuntimeError as error:
                self._capturable = False
                return _without_graphs(error, rows.device, lambda: self._function(rows))
        static, graph, out = self._captured[key]
        static[: len(rows)].copy_(rows)
        graph.replay()
        return out[: len(rows)].clone()


def _without_graphs(error: RuntimeError, device: torch.device, run: Callable[[], Tensor]) -> Tensor:
    """Say so once, and run as it comes."""
    log.warning("this model runs without captured graphs: %s", str(error).splitlines()[0])
    torch.cuda.synchronize(device)
    return run()


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

    def __init__(self, graphs: Graphs, forward: Forward, storage: CudaKVStorage, group_of: Sequence[int]) -> None:
        self._makes, self._forward, self._storage, self._group_of = graphs, forward, storage, group_of
        self._graphs: dict[tuple[object, ...], Captured] = {}
        self._pages = storage.n_pages
        self._capturable = True

    def run(self, batch: Batch) -> Tensor:
        """See `BatchRunner`. The result is under way: whoever reads it waits."""
        size = Size.of(batch.plan) if self._capturable else None
        if size is None:
            return self._as_it_comes(batch)
        if self._storage.n_pages != self._pages:
            self._graphs.clear()
            self._pages = self._storage.n_pages
        key = (size, batch.blocks.start, batch.blocks.stop, batch.rows.dtype, batch.rows.shape[1:])
        if key not in self._graphs:
            try:
                self._graphs[key] = Captured(size, batch, self._makes, self._forward, self._storage, self._group_of)
            except torch.OutOfMemoryError:
                raise  # there may be memory again
            except RuntimeError as error:
                self._capturable = False
                return _without_graphs(error, self._storage.device, lambda: self._as_it_comes(batch))
        return self._graphs[key](batch)

    def _as_it_comes(self, batch: Batch) -> Tensor:
        size = Size.exactly(batch.plan)
        staging = Staging(size, batch.rows, self._storage.device)
        staging.send(batch)
        metadata = size.metadata(staging.flat)
        attend = self._storage.attention([metadata[g] for g in self._group_of])
        return self._forward(staging.rows, size.positions(staging.flat), attend, batch.blocks)
