"""Packed linear layers and paged attention beside torch's own: `python -m tests.bench.kernels [--json] [--threads N]`.

All contenders of a row are timed in turn in the same process; the times are medians. Weights and caches rotate
through copies larger than a cache, as in a model. `floor_ms` is the time in which the weights' bytes can be read.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from petal.kernels.attention import attend
from petal.kernels.linear import PackedLinear, arithmetic
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.kernels.batches import batch_of, chain, tree

FORMATS = {"float32": torch.float32, "bf16": torch.bfloat16}
LINEAR = {
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)],
    "a drafter's head": [(256, 49152)],
    "Llama-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
}
ROWS = [1, 4, 8, 16, 32, 64, 256, 1024]
ATTENTION = {
    "decode": (256, chain(1)),
    "decode, long": (4096, chain(1)),
    "tree": (1024, tree(64)),
    "prefill": (0, chain(1024)),
    "prefill, later chunk": (3840, chain(256)),
}
HEADS, WIDTH = (9, 3), 64
ROTATE = 256 * 2**20  # bytes of float32 weights in all
BUDGET = 1.0  # seconds a row
Call = Callable[[int], object]  # given a running index


def compare(calls: Sequence[Call]) -> list[float]:
    """Median milliseconds of each, timed in turn."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for index in range(300):
        for call, taken in zip(calls, times, strict=True):
            before = time.perf_counter()
            call(index)
            taken.append(time.perf_counter() - before)
        if index >= 4 and time.perf_counter() - start > BUDGET:
            break
    return [statistics.median(taken[1:]) * 1e3 for taken in times]


def bytes_per_ms() -> float:
    """What the memory gives at best to one sum over weights that no cache holds."""
    weights = torch.zeros(ROTATE // 4)
    return ROTATE / min(compare([lambda _: weights.sum()])[0] for _ in range(3))


def linear_rows(speed: float) -> Iterator[dict]:
    for model, shapes in LINEAR.items():
        for width, out in shapes:
            calls = linear_calls(width, out)
            for rows in ROWS:
                times = dict(
                    zip(calls, compare([call(torch.randn(rows, width)) for call in calls.values()]), strict=True)
                )
                for name, dtype in FORMATS.items():
                    size = dtype.itemsize * width * out
                    yield {
                        "model": model,
                        "format": name,
                        "shape": f"{width}x{out}",
                        "M": rows,
                        "ms": times[name],
                        "floor_ms": size / speed,
                        "bf16_ms": times["torch bf16"],
                        "float32_ms": times["torch float32"],
                        "bytes": size,
                    }


def linear_calls(width: int, out: int) -> dict[str, Callable[[Tensor], Call]]:
    """Each contender, given x."""
    copies = max(1, ROTATE // (4 * width * out))
    weights = [torch.randn(out, width) / width**0.5 for _ in range(copies)]
    halves = [weight.bfloat16() for weight in weights]
    packed = {name: [PackedLinear(weight, dtype=dtype) for weight in weights] for name, dtype in FORMATS.items()}

    def ours(layers: list[PackedLinear]) -> Callable[[Tensor], Call]:
        return lambda x: lambda i: layers[i % copies](x)

    def torchs(weights: list[Tensor]) -> Callable[[Tensor], Call]:
        dtype = weights[0].dtype
        return lambda x: (lambda y: lambda i: F.linear(y, weights[i % copies]))(x.to(dtype))

    calls = {name: ours(layers) for name, layers in packed.items()}
    return calls | {"torch float32": torchs(weights), "torch bf16": torchs(halves)}


def attention_rows() -> Iterator[dict]:
    for name, (base, parents) in ATTENTION.items():
        ours, torchs = compare(attention_pair(base, parents))
        yield {
            "format": "float32",
            "shape": f"{name} at {base}",
            "M": len(parents),
            "ms": ours,
            "float32_ms": torchs,
        }


def attention_pair(base: int, parents: list[int]) -> tuple[Call, Call]:
    b, rows, causal = batch_of([(base, parents)], HEADS, (WIDTH, WIDTH)), len(parents), base == 0
    q = b.q.transpose(0, 1)[None].contiguous()
    k, v = (torch.randn(1, HEADS[1], base + rows, WIDTH) for _ in range(2))
    mask = torch.ones(rows, base + rows, dtype=torch.bool).tril(base) if rows > 1 and not causal else None

    def theirs(_: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)

    return lambda _: attend(b.q, b.k, b.v, b.k_pages, b.v_pages, b.plan, scale=WIDTH**-0.5), theirs


def show(title: str, rows: list[dict]) -> None:
    columns = [key for key in rows[0] if key not in ("model", "bytes")]
    table = Table(*(column.replace("_", " ") for column in columns), title=title, title_justify="left")
    for r in rows:
        table.add_row(*(f"{r[c]:.3f}" if isinstance(r[c], float) else str(r[c]) for c in columns))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        speed = bytes_per_ms()
        linear, attention = list(linear_rows(speed)), list(attention_rows())
    show("Linear layers; bf16 ms and float32 ms are torch's", linear)
    show("Attention; float32 ms is torch's", attention)
    if arguments.json:
        facts = {"device": "cpu", "threads": arguments.threads, "gb_per_s": speed / 1e6}
        print(
            json.dumps(facts | {"bf16_arithmetic": arithmetic(torch.bfloat16), "rows": linear, "attention": attention})
        )


if __name__ == "__main__":
    main()
