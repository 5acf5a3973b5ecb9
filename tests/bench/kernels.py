"""Linear layers by weight format, and paged attention beside torch's own: `python -m tests.bench.kernels [--json]`.

All contenders of a row are timed in turn in the same process; the times are medians. Weights and caches rotate
through copies larger than a cache, as in a model. `floor_ms` is the longer of two times: that in which the packed bytes
can be read, and that in which a large product of torch's in bfloat16 does as many operations. `bf16_ms` is our own
dense bfloat16 layer, `torch_bf16_ms` torch's. `cpu` says the same in the processor time of this process, which other
programs on the machine disturb less. `bytes` are resident, `packed` what the format asks for.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from petal.kernels.backend import LayerSpec, Linear
from petal.kernels.formats.base import QuantizedTensor
from petal.kernels.formats.registry import FORMATS
from petal.kernels.registry import backend_for
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.bench import kernels_cuda
from tests.kernels.batches import batch_of, chain, tree
from tests.kernels.quantized_weights import random_tensors

DENSE = {"float32": torch.float32, "bf16": torch.bfloat16}
LINEAR = {
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)],
    "Llama-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
}
ROWS = [1, 8, 32, 64, 256]
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
Call = Callable[..., object]  # given a running index, or rows


def compare(calls: Sequence[Call], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Median milliseconds of each, timed in turn."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for index in range(300):
        for call, taken in zip(calls, times, strict=True):
            before = clock()
            call(index)
            taken.append(clock() - before)
        if index >= 4 and time.perf_counter() - start > BUDGET:
            break
    return [statistics.median(taken[1:]) * 1e3 for taken in times]


def bytes_per_ms() -> float:
    """What the memory gives at best to one sum over weights that no cache holds."""
    weights = torch.zeros(ROTATE // 4)
    return ROTATE / min(compare([lambda _: weights.sum()])[0] for _ in range(3))


def products_per_ms() -> float:
    """Multiply-adds that torch's bfloat16 does at best."""
    a, b = torch.randn(1024, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    return 1024 * 4096 * 4096 / min(compare([lambda _: F.linear(a, b)])[0] for _ in range(3))


def linear_rows(formats: Sequence[str], rows_of_x: Sequence[int], speeds: tuple[float, float]) -> Iterator[dict]:
    for model, shapes in LINEAR.items():
        for width, out in shapes:
            layers = layers_of(formats, width, out)
            for rows in rows_of_x:
                calls = {name: running(held, torch.randn(rows, width)) for name, held in layers.items()}
                wall = dict(zip(calls, compare(list(calls.values())), strict=True))
                cpu = dict(zip(calls, compare(list(calls.values()), time.process_time), strict=True))
                for name in calls:
                    if name.startswith("torch"):
                        continue
                    resident, packed = sizes_of(name, layers[name][0], (out, width))
                    yield {
                        "model": model,
                        "format": name,
                        "shape": f"{width}x{out}",
                        "M": rows,
                        "ms": wall[name],
                        "floor_ms": max(packed / speeds[0], rows * width * out / speeds[1]),
                        "bf16_ms": wall["bf16"],
                        "torch_bf16_ms": wall["torch bf16"],
                        "ratio": wall[name] / wall["bf16"],
                        "cpu_ratio": cpu[name] / max(cpu["bf16"], 1e-9),
                        "bytes": resident,
                        "packed": packed,
                    }


def layers_of(formats: Sequence[str], width: int, out: int) -> dict[str, list[Call]]:
    """Copies of a layer by contender, so many that no cache holds them."""
    copies = max(1, ROTATE // (4 * width * out))
    weight = torch.randn(out, width) / width**0.5
    held: dict[str, list[Call]] = {}
    backend = backend_for()
    for name, dtype in DENSE.items():
        held[name] = [backend.linear(weight, dtype=dtype) for _ in range(copies)]
    halves = [weight.bfloat16() for _ in range(copies)]
    held["torch bf16"] = [lambda x, half=half: F.linear(x.bfloat16(), half) for half in halves]
    for name in formats:
        if width % getattr(FORMATS[name], "block", 1) == 0:
            tensors = random_tensors(FORMATS[name], (out, width))
            held[name] = [
                backend.linear(
                    QuantizedTensor(FORMATS[name], {key: t.clone() for key, t in tensors.items()}, (out, width))
                )
                for _ in range(copies)
            ]
    return held


def running(layers: list[Call], x: Tensor) -> Call:
    """Each copy in its turn; what a layer looks up at its first call is not timed."""
    for layer in layers:
        layer(x)
    return lambda index: layers[index % len(layers)](x)


def sizes_of(name: str, layer: Call, shape: tuple[int, int]) -> tuple[int, int]:
    """Resident and packed bytes of a layer's weights."""
    assert isinstance(layer, Linear)
    if name in DENSE:
        return layer.nbytes, DENSE[name].itemsize * shape[0] * shape[1]
    return layer.nbytes, backend_for().nbytes(FORMATS[name], shape)


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

    spec = LayerSpec(b.k.shape[1], WIDTH, WIDTH, None)
    storage: Any = backend_for().kv_storage([spec], *b.k_pages.shape[:2])
    storage.keys, storage.values = [b.k_pages], [b.v_pages]
    return lambda _: storage.attention([b.metadata])(0, b.q, b.k, b.v, scale=WIDTH**-0.5), theirs


def show(title: str, rows: list[dict]) -> None:
    columns = [key for key in rows[0] if key not in ("model", "bytes")]
    table = Table(*(column.replace("_", " ") for column in columns), title=title, title_justify="left")
    for r in rows:
        table.add_row(*(f"{r[c]:.3f}" if isinstance(r[c], float) else str(r[c]) for c in columns))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: see tests.bench.kernels_cuda")
    parser.add_argument("--part", action="append", help="of a card's bench, see there")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", default=",".join(name for name in FORMATS if name != "fp32"))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        kernels_cuda.measure(arguments.part, arguments.json)
        return
    torch.set_num_threads(arguments.threads)
    formats = [name for name in arguments.formats.split(",") if name not in DENSE]
    rows_of_x = [int(rows) for rows in arguments.rows.split(",")]
    with torch.inference_mode():
        speeds = bytes_per_ms(), products_per_ms()
        linear, attention = list(linear_rows(formats, rows_of_x, speeds)), list(attention_rows())
    show("Linear layers", linear)
    show("Attention; float32 ms is torch's", attention)
    if arguments.json:
        facts = {"device": "cpu", "threads": arguments.threads, "gb_per_s": speeds[0] / 1e6}
        facts |= {"gmac_per_s": speeds[1] / 1e6, "bf16_arithmetic": backend_for().arithmetic(torch.bfloat16)}
        print(json.dumps(facts | {"rows": linear, "attention": attention}))


if __name__ == "__main__":
    main()
