"""Runs the Triton kernels of attention without a card: `python -m tests.kernels.cuda.interpreted`.

Started with TRITON_INTERPRET=1. The interpreter multiplies float16 right and bfloat16 wrong, and numpy from 2.4 on
breaks its ranges over tensors: hence a process of its own, in float16.
"""

from __future__ import annotations

import sys

import torch
from petal.kernels.cuda import triton_attention
from petal.kernels.cuda.attention import Attention
from petal.kernels.cuda.layout import fields, pack
from petal.kernels.cuda.linear import Linear
from petal.kernels.formats.registry import FORMATS
from petal.kernels.metadata import AttentionMetadata
from petal.kernels.reference import attention

from tests.kernels.batches import batch_of, chain, tree
from tests.kernels.cuda.planned import extent_of, plan_rows
from tests.kernels.cuda.reading import dense
from tests.kernels.quantized_weights import random_tensors

CASES = {
    "sessions": ([(70, tree(9)), (0, chain(5)), (130, [-1])], (6, 2), (64, 64), {}),
    "wide heads": ([(65, chain(70))], (2, 2), (80, 48), {}),
    "window": ([(200, tree(7)), (3, [-1])], (4, 1), (32, 32), {"window": 70}),
    "softcap and sinks": ([(100, tree(6))], (4, 2), (32, 32), {"softcap": 3.0, "sinks": True}),
}


def attend(plan: AttentionMetadata, batch, options: dict) -> torch.Tensor:
    counts, bases, parents = (t.tolist() for t in (plan.row_count, plan.base, plan.parents))
    heads = batch.q.shape[1] // batch.k.shape[1]
    queries = plan_rows(extent_of(counts, bases, parents), heads, counts, bases, parents, plan.page_table)
    made = object.__new__(Attention)
    made._kernels, made._workspaces = triton_attention, [torch.full((1 << 20,), torch.nan)]
    out = torch.full_like(batch.q[..., : batch.v.shape[2]], torch.nan).contiguous()
    return made.attend(batch.q, batch.k_pages, batch.v_pages, queries, out, scale=0.2, **options)


def multiplied(name: str, rows: int, biased: bool) -> float:
    """The error of the twin of products, in float16 for the interpreter's sake."""
    shape, tile = (72, 768), 8 if rows <= 8 else 16
    weights = pack(fields(FORMATS[name], random_tensors(FORMATS[name], shape), shape))
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).half()
    bias = torch.linspace(-1, 1, shape[0])
    tiles = -(-rows // tile)
    padded = torch.zeros(tiles * tile, weights.depth_blobs * 64, dtype=torch.float16)
    padded[:rows, : shape[1]] = x
    packed = padded.view(tiles, tile, -1, 8).transpose(1, 2).contiguous()
    made = object.__new__(Linear)
    made._levels = None
    out = torch.full((rows, shape[0]), torch.nan, dtype=torch.float16)
    made._twin(weights, packed, rows, out, bias if biased else None)
    expected = x.double() @ dense(weights).T + (bias if biased else 0)
    return float((out.double() - expected).norm() / expected.norm())


def main() -> int:
    for name, rows, biased in (("int4", 5, False), ("int4", 20, True), ("nf4", 16, False)):
        error = multiplied(name, rows, biased)
        print(f"{name}: {error:.1e}")
        if not error < 1e-2:  # the interpreter cuts weights to bfloat16 and does not round them
            return 1
    for name, (segments, heads, widths, options) in CASES.items():
        batch = batch_of(segments, heads, widths, torch.float16)
        plan = batch.metadata
        for segment, rows, asking in plan.segments():
            base = int(plan.base[segment])
            places = plan.places(segment, torch.arange(base, base + rows.stop - rows.start))
            batch.k_pages.flatten(0, 1)[places] = batch.k[asking]
            batch.v_pages.flatten(0, 1)[places] = batch.v[asking]
        if options.get("sinks"):
            options = {**options, "sinks": torch.linspace(-1, 2, heads[0])}
        expected = attention(batch.q, batch.k_pages, batch.v_pages, plan, scale=0.2, **options)
        got = attend(plan, batch, options)
        error = float((got.double() - expected).norm() / expected.norm())
        print(f"{name}: {error:.1e}")
        if not error < 2e-3:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
