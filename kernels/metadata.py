"""What attention must know about one ragged batch: built once a forward, used by every layer."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Concatenated rows of S segments (one step of one session each), N rows in all. Tensors are int32, on the CPU.

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

    @functools.cached_property
    def asking(self) -> int:
        """Rows of the queries."""
        return len(self.positions) - (0 if self.stored is None else int(self.stored.sum()))

    @functools.cached_property
    def fields(self) -> tuple[int, ...]:
        """Addresses and sizes as the native call wants them. Raises ValueError if shapes or dtypes do not fit."""
        tensors = [self.row_start, self.row_count, self.base, self.positions, self.parents, self.page_table]
        tensors += [] if self.stored is None else [self.stored]
        if any(t.dtype != torch.int32 or not t.is_cpu or not t.is_contiguous() for t in tensors):
            raise ValueError("plan tensors are contiguous int32 tensors on the CPU")
        segments, rows = len(self.row_start), len(self.positions)
        if not (
            self.row_count.shape == self.base.shape == (segments,)
            and self.parents.shape == (rows,)
            and self.page_table.shape[:-1] == (segments,)
            and self.page_size > 0
        ):
            raise ValueError("plan tensors disagree about the number of segments or rows")
        lowest = torch.stack((self.row_start, self.row_count, self.base))
        if segments and (lowest.min() < 0 or (self.row_start + self.row_count).max() > rows):
            raise ValueError("a segment of the plan reaches outside the batch")
        addresses = [t.data_ptr() for t in tensors] + ([0] if self.stored is None else [])
        return (*addresses, segments, self.page_table.shape[1], self.page_size)

    def segments(self) -> Iterator[tuple[int, slice, slice]]:
        """Each segment's index, its rows in the plan, and those that ask, as rows of the queries."""
        passed = 0
        for index, (start, count) in enumerate(zip(self.row_start.tolist(), self.row_count.tolist(), strict=True)):
            before = start - passed
            passed += 0 if self.stored is None else int(self.stored[index])
            yield index, slice(start, start + count), slice(before, start + count - passed)

    def places(self, segment: int, slots: Tensor) -> Tensor:
        """Where slots of a segment lie in the pages seen as one list of rows."""
        return self.page_table[segment][slots // self.page_size] * self.page_size + slots % self.page_size
