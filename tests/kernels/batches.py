"""Ragged batches for the attention tests."""

import random
from dataclasses import dataclass, replace

import torch
from petal.kernels.metadata import AttentionMetadata
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    metadata: AttentionMetadata

    def with_pages(self) -> "Batch":
        """A copy whose cache may be written."""
        return replace(self, k_pages=self.k_pages.clone(), v_pages=self.v_pages.clone())


def chain(rows: int) -> list[int]:
    return list(range(-1, rows - 1))


def tree(rows: int, seed: int = 0) -> list[int]:
    """Parents of a tree that grows deep and wide; some rows share a root."""
    pick = random.Random(seed)
    return [-1, *(pick.randrange(max(0, row - 6), row) for row in range(1, rows))]


def metadata_of(
    segments: list[tuple[int, list[int]]], page_size: int = 16, seed: int = 0
) -> tuple[AttentionMetadata, int]:
    """The metadata of segments (base, parents) over shuffled pages, and the number of pages (some are unused)."""
    needed = [-(-(base + len(parents)) // page_size) for base, parents in segments]
    pages = list(range(sum(needed) + 3))
    random.Random(seed).shuffle(pages)
    positions: list[int] = []
    for base, parents in segments:
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        positions += [base + depth for depth in depths]
    table = [[pages.pop() for _ in range(count)] + [-1] * (max(needed) - count) for count in needed]
    counts = [len(parents) for _, parents in segments]
    metadata = AttentionMetadata(
        row_start=_int32([sum(counts[:i]) for i in range(len(counts))]),
        row_count=_int32(counts),
        base=_int32([base for base, _ in segments]),
        positions=_int32(positions),
        parents=_int32([parent for _, parents in segments for parent in parents]),
        page_table=_int32(table),
        page_size=page_size,
    )
    return metadata, sum(needed) + 3


def batch_of(
    segments: list[tuple[int, list[int]]],
    heads: tuple[int, int] = (6, 2),
    widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
) -> Batch:
    """Random rows and a cache that is NaN wherever no committed row lies."""
    metadata, pages = metadata_of(segments, page_size)
    noise = torch.Generator().manual_seed(1)
    rows, (q_heads, kv_heads), (width, value_width) = len(metadata.positions), heads, widths

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(dtype)

    k_pages = torch.full((pages, page_size, kv_heads, width), torch.nan, dtype=dtype)
    v_pages = torch.full((pages, page_size, kv_heads, value_width), torch.nan, dtype=dtype)
    for index, (base, _) in enumerate(segments):
        places = metadata.places(index, torch.arange(base))
        k_pages.flatten(0, 1)[places] = normal(base, kv_heads, width)
        v_pages.flatten(0, 1)[places] = normal(base, kv_heads, value_width)
    q = normal(rows, q_heads, width)
    k, v = normal(rows, kv_heads, width), normal(rows, kv_heads, value_width)
    return Batch(q, k, v, k_pages, v_pages, metadata)


def _int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
