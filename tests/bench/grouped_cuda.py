"""Rows that meet different weights: mixtures of experts and adapters, as parts of `tests.bench.kernels_cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from petal.kernels.cuda.adapters import Adapters
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.experts import Experts, ExpertWeights, Grouping
from petal.kernels.cuda.layout import Weights

from tests.bench import kernels_cuda as products

if TYPE_CHECKING:
    from tests.bench.kernels_cuda import Bench

ROWS = (1, 16, 64, 256)
# Width, inner width, experts, choices of a row.
MIXTURES = {"Mixtral 8x7B": (4096, 14336, 8, 2), "Qwen3 30B-A3B": (2048, 768, 128, 8)}
RANK, ADAPTERS = 16, 8


def experts(bench: Bench) -> Iterator[dict]:
    """A block's experts in int4: sorting, gates and ups, downs, sums. The floor: weights that are met, read once."""
    mixture, layout = Experts(bench.linear._runtime), LAYOUTS["Int4"]
    for name, (width, inner, count, each) in MIXTURES.items():
        copies = [random_experts(width, inner, count) for _ in range(2)]
        for rows in ROWS:
            x = torch.randn(rows, width, device="cuda").bfloat16()
            chosen = torch.stack([torch.randperm(count, device="cuda")[:each] for _ in range(rows)]).int()
            shares = torch.rand(rows, each, device="cuda")
            met, one = len(chosen.unique()), 3 * width * inner
            bytes = met * one * products.BITS["Int4"] / 8 / bench.ceilings.bytes_per_ms
            floor = max(bytes, 2 * rows * each * one / bench.ceilings.flops_per_ms)
            batch = x, chosen, shares
            ms = products.graph_ms([lambda w=w, batch=batch: mixture(w, *batch) for w in copies * 3])
            yield {"format": f"experts {layout.name}", "shape": f"{name}, {met} met", "M": rows, "ms": ms,
                   "floor_ms": floor, "ratio": ms / floor}  # fmt: skip


def random_experts(width: int, inner: int, count: int) -> ExpertWeights:
    def weights(outputs: int, depth: int) -> Weights:
        whole = products.random_weights(LAYOUTS["Int4"], (outputs * count, depth))
        return Weights(whole.layout, (outputs, depth), whole.blobs)

    return ExpertWeights(weights(2 * inner, width), weights(width, inner))


def adapters(bench: Bench) -> Iterator[dict]:
    """What eight adapters of rank 16 add to the time of a product of 8192 x 8192, rows dealt out among them."""
    runtime, shape = bench.linear._runtime, (8192, 8192)
    parts = [(torch.randn(RANK, shape[1]) / 90, torch.randn(shape[0], RANK)) for _ in range(ADAPTERS)]
    made, grouping = Adapters(runtime, parts), Grouping(runtime)
    for rows in ROWS:
        x, y = (torch.randn(rows, 8192, device="cuda").bfloat16() for _ in range(2))
        which = (torch.arange(rows, device="cuda") * ADAPTERS // rows).int()
        grouped = made.group(grouping, which)
        ms = products.graph_ms([lambda: made.add(x, y, grouped)] * 20)  # noqa: B023
        used = min(rows, ADAPTERS) * RANK * sum(shape) * 2
        yield {"format": f"{ADAPTERS} adapters of rank {RANK}", "shape": "8192x8192", "M": rows, "ms": ms,
               "floor_ms": used / bench.ceilings.bytes_per_ms}  # fmt: skip


PARTS = {"experts": experts, "adapters": adapters}
