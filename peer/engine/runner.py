"""One ragged forward: the rows of all slices of an iteration in one row, attention over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from ...kernels.cpu.attention import attend
from ...kernels.metadata import AttentionPlan
from ...protocol.wire.tree import StepTree
from ..model import Span
from . import fallback as cached
from .kv_cache import PAGE, KVPool, SessionCache


@dataclass(frozen=True)
class Segment:
    """Rows of one step: ids [n] or hidden states [n, d], their tree within the segment, the blocks to apply."""

    cache: SessionCache
    rows: Tensor
    tree: StepTree
    blocks: range


class Executor:
    """Runs segments through the span; their rows become pending rows of their caches."""

    def __init__(self, span: Span, pool: KVPool) -> None:
        self._span = span
        self._pool = pool

    def run(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Hidden states behind each segment's last block, [n, d].

        One forward, unless routes cut the span in parts or some clients send embeddings.
        """
        results: dict[int, Tensor] = {}
        ways = [(segment.blocks, segment.rows.dim()) for segment in segments]
        for way in dict.fromkeys(ways):
            chosen = [i for i, other in enumerate(ways) if other == way]
            results |= zip(chosen, self._forward([segments[i] for i in chosen], way[0]), strict=True)
        return [results[i] for i in range(len(segments))]

    def _forward(self, segments: Sequence[Segment], blocks: range) -> Sequence[Tensor]:
        bases = [segment.cache.length for segment in segments]
        for segment in segments:
            self._pool.append(segment.cache, len(segment.rows))
        if not self._span.ragged:
            return [cached.forward(self._span, self._pool, s.cache, s.rows, s.tree.parents, blocks) for s in segments]
        counts = [len(segment.rows) for segment in segments]
        plans = self._plans(segments, bases, counts)
        pool = self._pool

        def attend_rows(layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            plan = plans[pool.group_of[layer]]
            return attend(query, key, value, pool.keys[layer], pool.values[layer], plan, **options)

        rows = torch.cat([segment.rows for segment in segments]) if len(segments) > 1 else segments[0].rows
        return self._span.forward(rows, plans[0].positions.long(), attend_rows, blocks).split(counts)

    def _plans(self, segments: Sequence[Segment], bases: list[int], counts: list[int]) -> list[AttentionPlan]:
        """One plan for each layer group; they differ in the page table alone."""
        parts = {
            "row_start": list(accumulate(counts, initial=0))[:-1],
            "row_count": counts,
            "base": bases,
            "positions": [
                b + depth for b, segment in zip(bases, segments, strict=True) for depth in segment.tree.depths
            ],
            "parents": [parent for segment in segments for parent in segment.tree.parents],
        }
        # One tensor for all: for a single row, making them one by one would take as long as a layer.
        flat = torch.tensor(list(chain.from_iterable(parts.values())), dtype=torch.int32)
        shared = dict(zip(parts, flat.split([len(part) for part in parts.values()]), strict=True))
        caches = [segment.cache for segment in segments]
        return [
            AttentionPlan(**shared, page_table=self._pool.page_table(caches, g), page_size=PAGE)
            for g in range(len(self._pool.groups))
        ]
