"""What `plan.cu` makes of a batch, in plain Python."""

from __future__ import annotations

import torch
from petal.kernels.cuda.attention import _TILE as TILE
from petal.kernels.cuda.attention import Extent, Queries


def extent_of(counts: list[int], bases: list[int], parents: list[int], stored: list[int] | None = None) -> Extent:
    skipped = stored or [0] * len(counts)
    asking = [c - s for c, s in zip(counts, skipped, strict=True)]
    return Extent(
        queries=sum(asking),
        segments=len(counts),
        longest=max(b + c for b, c in zip(bases, counts, strict=True)),
        deepest=max(counts),
        widest=max(asking),
    )


def plan_rows(
    extent: Extent,
    heads: int,
    counts: list[int],
    bases: list[int],
    parents: list[int],
    table: torch.Tensor,
    stored: list[int] | None = None,
) -> Queries:
    n, width, group = extent.queries, max(1, extent.deepest), extent.group(heads)
    per_query: list[list[int]] = []
    paths = torch.full((n, width), -7, dtype=torch.int32)
    groups, full_of = [], []
    start = 0
    for segment, (count, base) in enumerate(zip(counts, bases, strict=True)):
        mine = parents[start : start + count]
        skipped = stored[segment] if stored else 0
        begin = len(per_query)
        for u in range(skipped, count):
            way = [u]
            while mine[way[-1]] >= 0:
                way.append(mine[way[-1]])
            way.reverse()
            chain = next((i for i in range(count) if mine[i] != i - 1), count)
            alike = next((i for i, w in enumerate(way) if w != i or w >= chain), len(way))
            paths[len(per_query), : len(way) - alike] = torch.tensor([base + w for w in way[alike:]])
            per_query.append([segment, base + len(way) - 1, base + u, base + alike])
        for at in range(begin, len(per_query), group):
            end = min(at + group, len(per_query))
            full = min(per_query[q][3] for q in range(at, end)) // TILE * TILE
            full_of += [full] * (end - at)
            groups.append([end - at, at, full, segment])
        start += count
    groups += [[0] * 4] * (extent.groups(heads) - len(groups))
    columns = torch.tensor(per_query, dtype=torch.int32).T.contiguous()
    full = torch.tensor(full_of, dtype=torch.int32)
    return Queries(extent, table, *columns.unbind(), full, paths, torch.tensor(groups, dtype=torch.int32))
