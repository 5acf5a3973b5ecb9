"""What attention must know about one ragged batch: planned on the host, put on a device once a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPlan:
    """S segments, one step of one session each, as numbers of the host. See `AttentionMetadata`.

    `tables` has one page table a segment for each group of layers: [groups][S][pages].
    """

    counts: Sequence[int]
    bases: Sequence[int]
    positions: Sequence[int]
    parents: Sequence[int]
    tables: Sequence[Sequence[Sequence[int]]]
    page_size: int
    stored: Sequence[int] = ()
    """[S] how many of a segment's first rows an earlier forward stored; empty: none of any."""

    @property
    def asking(self) -> int:
        """Rows of the forward: those that are not stored yet."""
        return len(self.positions) - sum(self.stored)

    @property
    def asked(self) -> list[tuple[int, int]]:
        """Of each segment the first and the last of its rows that ask, as rows of `positions`."""
        stored = self.stored or [0] * len(self.counts)
        return [
            (stop - count + kept, stop)
            for stop, count, kept in zip(accumulate(self.counts), self.counts, stored, strict=True)
        ]

    @property
    def asking_positions(self) -> list[int]:
        """Of the rows that ask."""
        return list(chain.from_iterable(self.positions[start:stop] for start, stop in self.asked))

    def metadata(self, device: torch.device) -> list[AttentionMetadata]:
        """For each group of layers; they differ in the page table alone."""
        starts = list(accumulate(self.counts, initial=0))[:-1]
        parts = [starts, self.counts, self.bases, self.stored or [0] * len(starts), self.positions, self.parents]
        widths = [max(map(len, group), default=0) for group in self.tables]
        for group, width in zip(self.tables, widths, strict=True):
            parts += ([*table, *[-1] * (width - len(table))] for table in group)
        # One tensor for all: for a single row, making them one by one would take as long as a layer.
        flat = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int32).to(device)
        n, rows = len(starts), len(self.positions)
        start, count, base, kept, place, parent, tables = flat.split(
            [n, n, n, n, rows, rows, len(flat) - 4 * n - 2 * rows]
        )
        stored = kept if self.stored else None
        pieces = tables.split([n * width for width in widths])
        return [
            AttentionMetadata(start, count, base, place, parent, piece.view(n, width), self.page_size, stored)
            for piece, width in zip(pieces, widths, strict=True)
        ]


@dataclass
class AttentionMetadata:
    """Concatenated rows of S segments (one step of one session each), N rows in all. Tensors are int32, on one device.

    Slot s of a segment lies at offset s % page_size of page page_table[segment, s // page_size]. Slots below `base`
    are committed: slot j holds position j. Row u of a segment is pending, in slot base + u, whatever its position.
    A row sees the committed slots, its ancestors and itself. Rows that an earlier forward stored have no place in
    that forward's queries, keys and values.
    """

    row_start: Tensor
    """[S] first row of each segment in the batch."""
    row_count: Tensor
    """[S] rows of each segment."""
    base: Tensor
    """[S] committed rows in the cache."""
    positions: Tensor
    """[N] base + depth of the row in its tree."""
    parents: Tensor
    """[N] row index of the parent within the segment, lower than the row's own; -1 at depth 0."""
    page_table: Tensor
    """[S, max_pages] page ids; -1 where no row will look (dropped by a sliding window, or not yet needed)."""
    page_size: int
    stored: Tensor | None = None
    """[S] how many of a segment's first rows an earlier forward stored; None: none of any."""
    prepared: Any = field(default=None, init=False, repr=False, compare=False)
    """What a backend made of it at first use."""

    def check(self) -> None:
        """Raise ValueError if shapes or dtypes do not fit."""
        tensors = [self.row_start, self.row_count, self.base, self.positions, self.parents, self.page_table]
        tensors += [] if self.stored is None else [self.stored]
        if any(t.dtype != torch.int32 or not t.is_contiguous() for t in tensors):
            raise ValueError("metadata consists of contiguous int32 tensors")
        segments, rows = len(self.row_start), len(self.positions)
        if not (
            self.row_count.shape == self.base.shape == (segments,)
            and self.parents.shape == (rows,)
            and self.page_table.shape[:-1] == (segments,)
            and self.page_size > 0
        ):
            raise ValueError("metadata disagrees about the number of segments or rows")
        starts, counts, bases = self.row_start.tolist(), self.row_count.tolist(), self.base.tolist()
        if any(min(s, n, b) < 0 or s + n > rows for s, n, b in zip(starts, counts, bases, strict=True)):
            raise ValueError("a segment of the metadata reaches outside the batch")

    @property
    def asking(self) -> int:
        """Rows of the queries."""
        return len(self.positions) - (0 if self.stored is None else int(self.stored.sum()))

    def segments(self) -> Iterator[tuple[int, slice, slice]]:
        """Each segment's index, its rows in the batch, and those that ask, as rows of the queries."""
        passed = 0
        for index, (start, count) in enumerate(zip(self.row_start.tolist(), self.row_count.tolist(), strict=True)):
            before = start - passed
            passed += 0 if self.stored is None else int(self.stored[index])
            yield index, slice(start, start + count), slice(before, start + count - passed)

    def places(self, segment: int, slots: Tensor) -> Tensor:
        """Where slots of a segment lie in the pages seen as one list of rows."""
        return self.page_table[segment][slots // self.page_size] * self.page_size + slots % self.page_size
