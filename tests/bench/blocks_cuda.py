"""Attention over pages and blocks of the Llama kind on a card, as parts of `tests.bench.kernels_cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from petal.kernels.cuda.attention import Attention, Extent, Queries
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.block import Block, BlockShape, BlockWeights
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench import kernels_cuda as products
from tests.kernels.batches import tree

if TYPE_CHECKING:
    from tests.bench.kernels_cuda import Bench

PAGE, KV_HEADS, WIDTH = 16, 8, 128
CONTEXTS = {1024: 12, 4096: 8, 32768: 3}  # and copies of the cache that take turns
ATTENTION_ROWS = (1, 4, 16, 64, 256)
BLOCKS = {
    "70B": (BlockShape(8192, 28672, 64, KV_HEADS, WIDTH, 1e-5), 3),
    "8B": (BlockShape(4096, 14336, 32, KV_HEADS, WIDTH, 1e-5), 8),
}
Pages = tuple[torch.Tensor, torch.Tensor]


def depths(parents: list[int]) -> list[int]:
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def planned(attention: Attention, rows: int, context: int, group: int, longest: int = 0) -> Queries:
    """A tree of so many rows behind a context, over shuffled pages."""
    parents = tree(rows)
    below = depths(parents)

    def on_card(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    extent = Extent(rows, 1, longest or context + rows, max(below) + 1, rows)
    table = torch.randperm(pages_of(rows, context), device="cuda", dtype=torch.int32)[None]
    positions = on_card([context + depth for depth in below])
    return attention.plan(
        extent, group, on_card([0]), on_card([rows]), on_card([context]), positions, on_card(parents), table
    )


def pages_of(rows: int, context: int) -> int:
    return -(-(context + rows) // PAGE)


def caches(rows: int, context: int, copies: int) -> list[Pages]:
    size = (pages_of(rows, context), PAGE, KV_HEADS, WIDTH)
    return [random_pages(size) for _ in range(copies)]


def random_pages(size: tuple[int, ...]) -> Pages:
    return torch.randn(size, device="cuda").bfloat16(), torch.randn(size, device="cuda").bfloat16()


def attention_rows(bench: Bench) -> Iterator[dict]:
    """64 heads on 8, beside the best of torch's with an explicit mask over contiguous keys."""
    attention, heads = Attention(bench.linear._runtime), 64
    for context, copies in CONTEXTS.items():
        for rows in ATTENTION_ROWS:
            queries = planned(attention, rows, context, heads // KV_HEADS)
            q = torch.randn(rows, heads, WIDTH, device="cuda").bfloat16()
            out = torch.empty_like(q)

            def call(pages: Pages, q: torch.Tensor = q, queries: Queries = queries, out: torch.Tensor = out) -> object:
                return lambda: attention.attend(q, *pages, queries, out, scale=WIDTH**-0.5)

            ms = products.graph_ms([call(pages) for pages in caches(rows, context, copies)])
            floor = 4 * context * KV_HEADS * WIDTH / bench.ceilings.bytes_per_ms
            yield {
                "format": "attention",
                "shape": f"64 on 8 over {context}",
                "M": rows,
                "ms": ms,
                "floor_ms": floor,
                "share": floor / ms,
                "sdpa_ms": sdpa_ms(q, rows, context),
            }


def sdpa_ms(q: torch.Tensor, rows: int, context: int) -> float | None:
    kv = [random_pages((1, KV_HEADS, context + rows, WIDTH)) for _ in range(3)]
    mask = torch.rand(rows, context + rows, device="cuda") > 0.5 if rows > 1 else None
    query = q.transpose(0, 1)[None]

    def call(pages: Pages) -> products.Call:
        return lambda: F.scaled_dot_product_attention(query, *pages, attn_mask=mask, enable_gqa=True)

    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return products.graph_ms([call(pages) for pages in kv])
    except RuntimeError:
        return None


def block_rows(bench: Bench, name: str, layout: str, rows_of: tuple[int, ...], longest: int = 0) -> Iterator[dict]:
    """A whole block over 1,024 tokens and a tree: norms, rotations, page writes, attention, residuals, MLP."""
    shape, copies = BLOCKS[name]
    block = Block(bench.linear._runtime, shape)
    weights = [random_block(shape, layout) for _ in range(copies)]
    count = sum(w.shape[0] * w.shape[1] for w in (weights[0].qkv, weights[0].out, weights[0].gate_up, weights[0].down))
    for rows in rows_of:
        queries = planned(block._attention, rows, 1024, shape.heads // KV_HEADS, longest)
        pages, buffers = caches(rows, 1024, copies), block.buffers(rows)
        turns = torch.rand(rows, WIDTH, device="cuda")
        angles = turns.cos(), turns.sin()
        h = torch.randn(rows, shape.width, device="cuda").bfloat16()

        def call(index: int, h=h, pages=pages, angles=angles, q=queries, b=buffers) -> object:
            return lambda: block(weights[index], h, b.fed, pages[index], angles, q, b)

        ms = products.graph_ms([call(i) for i in list(range(copies)) * 2], 9)
        bytes = count * products.BITS[layout] / 8
        floor = max(bytes / bench.ceilings.bytes_per_ms, 2 * rows * count / bench.ceilings.flops_per_ms)
        yield {
            "format": f"block {layout}",
            "shape": name + (f" for {longest}" if longest else ""),
            "M": rows,
            "ms": ms,
            "floor_ms": floor,
            "ratio": ms / floor,
        }


def random_block(shape: BlockShape, layout: str) -> BlockWeights:
    def weights(outputs: int, width: int) -> products.Weights:
        return products.random_weights(LAYOUTS[layout], (outputs, width))

    norms = torch.rand(2, shape.width, device="cuda")
    seen = shape.heads * shape.head_width
    outputs = seen + 2 * shape.kv_heads * shape.head_width
    return BlockWeights(
        norms[0],
        weights(outputs, shape.width),
        weights(shape.width, seen),
        norms[1],
        weights(2 * shape.inner, shape.width),
        weights(shape.width, shape.inner),
    )


PARTS = {
    "attention": attention_rows,
    "block": lambda bench: block_rows(bench, "70B", "Int4", (1, 16, 64, 256)),
    "block-nf4": lambda bench: block_rows(bench, "70B", "Nf4", (1, 16, 64, 256)),
    "block-long": lambda bench: block_rows(bench, "70B", "Int4", (1, 64), 32768),
    "block-8b": lambda bench: block_rows(bench, "8B", "Int4", (1, 16, 64)),
}
