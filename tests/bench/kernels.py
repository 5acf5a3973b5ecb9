"""Packed linear layers and paged attention beside torch's own: `python -m tests.bench.kernels [--json] [--threads N]`.

Both sides of a row are timed alternately in the same process; the times are medians. Weights and caches rotate
through copies larger than a cache, as in a model. A ratio below 1 means that the kernels here are faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from petal.kernels.attention import attend
from petal.kernels.linear import PackedLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.kernels.batches import batch_of, chain, tree

LINEAR = [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
ATTENTION = {
    "decode": (256, chain(1)),
    "decode, long": (4096, chain(1)),
    "tree": (1024, tree(64)),
    "prefill": (0, chain(1024)),
    "prefill, later chunk": (3840, chain(256)),
}
HEADS, WIDTH = (9, 3), 64
ROTATE = 128 * 2**20  # bytes of weights in all
BUDGET = 0.5  # seconds a row
Call = Callable[[int], object]  # given a running index


def compare(ours: Call, torchs: Call) -> tuple[float, float]:
    """Median milliseconds of both."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for index in range(300):
        for call, taken in zip((ours, torchs), times, strict=True):
            before = time.perf_counter()
            call(index)
            taken.append(time.perf_counter() - before)
        if index >= 4 and time.perf_counter() - start > BUDGET:
            break
    first, second = (statistics.median(taken[1:]) * 1e3 for taken in times)
    return first, second


def linear_rows(dtype: torch.dtype) -> Iterator[dict]:
    for width, out in LINEAR:
        copies = max(1, min(64, ROTATE // (4 * width * out)))
        weights = [torch.randn(out, width) / width**0.5 for _ in range(copies)]
        layers = [PackedLinear(weight.to(dtype)) for weight in weights]
        for rows in ROWS:
            ours, torchs = compare(*linear_pair(layers, weights, torch.randn(rows, width)))
            yield row(f"linear {str(dtype)[6:]}", f"{width}x{out}", rows, ours, torchs)


def linear_pair(layers: list[PackedLinear], weights: list[Tensor], x: Tensor) -> tuple[Call, Call]:
    return lambda i: layers[i % len(layers)](x), lambda i: F.linear(x, weights[i % len(weights)])


def attention_rows() -> Iterator[dict]:
    for name, (base, parents) in ATTENTION.items():
        ours, torchs = compare(*attention_pair(base, parents))
        yield row("attention", f"{name} at {base}", len(parents), ours, torchs)


def attention_pair(base: int, parents: list[int]) -> tuple[Call, Call]:
    b, rows, causal = batch_of([(base, parents)], HEADS, (WIDTH, WIDTH)), len(parents), base == 0
    q = b.q.transpose(0, 1)[None].contiguous()
    k, v = (torch.randn(1, HEADS[1], base + rows, WIDTH) for _ in range(2))
    mask = torch.ones(rows, base + rows, dtype=torch.bool).tril(base) if rows > 1 and not causal else None

    def theirs(_: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)

    return lambda _: attend(b.q, b.k, b.v, b.k_pages, b.v_pages, b.plan, scale=WIDTH**-0.5), theirs


def row(op: str, shape: str, rows: int, ours: float, torchs: float) -> dict:
    return {"op": op, "shape": shape, "rows": rows, "ours_ms": ours, "torch_ms": torchs, "ratio": ours / torchs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("op", "shape", "rows", "ours, ms", "torch float32, ms", "ratio", title="Kernels")
    results = []
    with torch.inference_mode():
        for source in (linear_rows(torch.float32), linear_rows(torch.bfloat16), attention_rows()):
            for r in source:
                results.append(r)
                cells = [r["op"], r["shape"], str(r["rows"])]
                table.add_row(*cells, f"{r['ours_ms']:.3f}", f"{r['torch_ms']:.3f}", f"{r['ratio']:.2f}")
    Console().print(table)
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "rows": results}))


if __name__ == "__main__":
    main()
