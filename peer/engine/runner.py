"""One ragged forward: the rows of all chunks of an iteration in one batch, attention over the paged cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.backend import Batch
from ...kernels.metadata import BatchPlan
from ...protocol.wire.tree import StepTree, chain
from ..model import Span
from . import fallback
from .kv_cache import KVCache
from .page_table import PAGE, BlockTable, CacheExhausted


@dataclass(frozen=True)
class Segment:
    """Rows of one step: ids [n] or hidden states [n, d], their tree within the segment, the blocks to apply.

    `extent`: length of the sequence, see Span.forward.
    """

    table: BlockTable
    rows: Tensor
    tree: StepTree
    blocks: range
    extent: int = 0


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors as one; of a single one they stay where they are."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class ModelRunner:
    """Runs segments through the span; their rows become pending rows of their block tables."""

    def __init__(self, span: Span, cache: KVCache) -> None:
        self._span = span
        self._cache = cache
        # One for each kind of rotary angles: what a runner has captured holds for one.
        self._batches = [
            span.backend.runner(span.forward_at(extent), cache.storage, cache.table.group_of) for extent in span.extents
        ]

    def run(self, segments: Sequence[Segment]) -> Sequence[Tensor]:
        """Hidden states behind each segment's last block, [n, d].

        One forward, unless routes cut the span in parts, some clients send embeddings, or rotary angles differ.
        """
        ways = [(segment.blocks, segment.rows.dim(), self._angles(segment)) for segment in segments]
        kinds = dict.fromkeys(ways)
        if len(kinds) == 1:
            return self._forward(segments)
        results: dict[int, Tensor] = {}
        for kind in kinds:
            chosen = [i for i, way in enumerate(ways) if way == kind]
            results |= zip(chosen, self._forward([segments[i] for i in chosen]), strict=True)
        return [results[i] for i in range(len(segments))]

    def warm_up(self) -> None:
        """Have a device prepare what it prepares for each number of rows."""
        span, backend = self._span, self._span.backend
        width = () if span.start == 0 else (span.hidden_size,)
        for count in backend.row_sizes:
            rows = torch.zeros(count, *width, dtype=backend.stream if width else torch.long)
            table = self._cache.open()
            try:
                hidden = self.run([Segment(table, rows, chain(count), range(span.start, span.end))])[0]
                if span.end == span.n_blocks:
                    span.logits(hidden)
            except CacheExhausted:
                return
            finally:
                self._cache.release(table)

    def _forward(self, segments: Sequence[Segment]) -> Sequence[Tensor]:
        """Segments of one kind."""
        bases = [segment.table.length for segment in segments]
        for segment in segments:
            self._cache.append(segment.table, len(segment.rows))
        blocks = segments[0].blocks
        if not self._span.ragged:
            return [
                fallback.forward(self._span, self._cache, s.table, s.rows, s.tree.parents, blocks, s.extent)
                for s in segments
            ]
        counts = [len(segment.rows) for segment in segments]
        plan = BatchPlan(
            counts,
            bases,
            [base + depth for base, segment in zip(bases, segments, strict=True) for depth in segment.tree.depths],
            [parent for segment in segments for parent in segment.tree.parents],
            [[segment.table.pages[g] for segment in segments] for g in range(len(self._cache.table.groups))],
            PAGE,
        )
        batches = self._batches[self._angles(segments[0])]
        hidden = batches.run(Batch(joined([segment.rows for segment in segments]), plan, blocks))
        return hidden.split(counts) if len(counts) > 1 else [hidden]

    def _angles(self, segment: Segment) -> int:
        """Which of the span's kinds of rotary angles a segment has: that of its sequence's length."""
        return bisect_left(self._span.rope_borders, segment.extent)
