"""Products with packed weights on a card: `python -m tests.bench.kernels --device cuda [--part NAME] [--json]`.

Times are medians of replays of a CUDA graph whose weights rotate through more than 200 MB. `floor_ms` is the longer of
two times, both of ceilings measured in the same run: the weights' bytes by the speed of a copy, the operations by that
of a large bfloat16 product. `bf16_ms` is torch's own dense product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from petal.kernels.cuda import spqr
from petal.kernels.cuda.blobs import LAYOUTS, Layout
from petal.kernels.cuda.layout import Fields, Weights, pack, padded
from petal.kernels.cuda.linear import Linear, activations
from petal.kernels.cuda.runtime import runtime
from petal.kernels.cuda.tiling import Tiling, candidates, row_tile

Call = Callable[[], object]
ROTATE = 220e6  # bytes of weights in a graph
ROWS = (1, 4, 16, 32, 64, 128, 256)
# What `--part` names: layouts and shapes.
LARGE = ((28672, 8192), (8192, 28672))
MIDDLE = ((8192, 8192), (10240, 8192))
SMALL = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
# Bits a weight of each layout's format, as a checkpoint stores it.
BITS = {"Int4": 4.5, "Nf4": 4.5, "Int8": 8.0, "Bf16": 16.0, "Q4_0": 4.5, "Q4_1": 4.5, "Q8_0": 8.5, "Q5_K": 5.5,
        "Q6_K": 6.5625, "Aqlm2x8": 2.0, "Aqlm1x16": 2.0, "Int4Group32": 5.0, "Mxfp4": 4.25, "Fp8": 8.0,
        "Spqr": 4.32, "Nf4Across": 4.5}  # fmt: skip


def graph_ms(calls: Sequence[Call], replays: int = 7) -> float:
    """Median milliseconds a call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for index in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times) / len(calls)


def eager_ms(call: Call, times: int = 12) -> float:
    """Median milliseconds of a call that is long enough to hide its launch."""
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[2:])


def family(layout: Layout) -> str:
    """SpQR has a layout for each length of its lists."""
    return layout.name.partition("<")[0]


@dataclass(frozen=True)
class Ceilings:
    """What the card gives at best."""

    bytes_per_ms: float
    flops_per_ms: float

    @classmethod
    def measured(cls) -> Ceilings:
        bytes = torch.randint(0, 255, (2, 2**30), dtype=torch.uint8, device="cuda")
        copy = eager_ms(lambda: bytes[1].copy_(bytes[0]))  # in a graph torch's copy is slower than by itself
        bytes = torch.empty(0)
        x, y = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        product = graph_ms([lambda: torch.mm(x, y)] * 4)
        return cls(2 * 2**30 / copy, 2 * 8192**3 / product)

    def floor(self, layout: Layout, shape: tuple[int, int], rows: int) -> float:
        weights = shape[0] * shape[1]
        return max(weights * BITS[family(layout)] / 8 / self.bytes_per_ms, 2 * rows * weights / self.flops_per_ms)


def random_weights(layout: Layout, shape: tuple[int, int]) -> Weights:
    """Blobs of random bytes: their numbers may be anything that is finite and not small."""
    outputs, width = shape
    if family(layout) == "Spqr":
        return random_spqr(shape)
    blobs = torch.randint(0, 256, (padded(outputs, 64) // 64, padded(width, 512) // 64, layout.bytes),
                          dtype=torch.uint8, device="cuda")  # fmt: skip
    codes = {"Int8": 4096, "Q8_0": 4096, "Fp8": 4096, "Bf16": 0, "Aqlm2x8": 1024, "Aqlm1x16": 1024}.get(
        layout.name, 2048
    )
    if codes < layout.bytes:
        numbers = torch.rand(*blobs.shape[:2], (layout.bytes - codes) // 2, device="cuda") * 0.01 + 0.01
        halves = numbers.bfloat16()
        blobs[..., codes:] = halves.view(torch.uint8)
    scale = torch.rand(padded(outputs, 64), device="cuda") if layout.scaled else None
    books = torch.randn(512 if layout.table else 65536, 8, device="cuda").bfloat16() if layout.reordered else None
    return Weights(layout, shape, blobs, scale, books)


def random_spqr(shape: tuple[int, int], share: float = 0.01) -> Weights:
    """Outliers at random places; blobs of 2,048 outputs again and again."""
    outputs, width = shape
    some = (min(outputs, 2048), width)
    rows = {"codes": torch.randint(0, 8, some, dtype=torch.uint8, device="cuda")}
    rows |= {name: torch.rand(some[0], -(-width // 16), device="cuda") for name in ("scale", "middle")}
    values = torch.randn(some, device="cuda").bfloat16()
    rows["outliers"] = torch.where(torch.rand(some, device="cuda") < share, values, torch.nan)
    packed = pack(Fields(spqr.layout(0), width, rows))
    blobs = packed.blobs.repeat(-(-outputs // some[0]), 1, 1)[: padded(outputs, 64) // 64].contiguous()
    return Weights(packed.layout, shape, blobs)


def layout_named(name: str) -> Layout:
    return random_spqr((64, 8192)).layout if name == "Spqr" else LAYOUTS[name]


class Bench:
    """Products of one shape after another."""

    def __init__(self) -> None:
        self.linear = Linear(runtime(torch.device("cuda", 0)))
        self.card = self.linear._card
        self.ceilings = Ceilings.measured()

    def copies(self, layout: Layout, shape: tuple[int, int]) -> list[Weights]:
        first = random_weights(layout, shape)
        count = max(2, int(ROTATE // first.blobs.nbytes) + 1)
        more = [
            Weights(first.layout, shape, first.blobs.clone(), first.scale, first.codebooks) for _ in range(count - 1)
        ]
        return [first, *more]

    def ms(self, copies: list[Weights], rows: int, tiling: Tiling, overlap: bool = True) -> float:
        outputs, width = copies[0].shape
        packed = activations(rows, width, row_tile(rows, self.card), torch.device("cuda")).normal_()
        out = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")

        def call(weights: Weights) -> Call:
            return lambda: self.linear.product(weights, packed, rows, out, tiling=tiling, overlap=overlap)

        return graph_ms([call(w) for w in copies * max(1, 12 // len(copies))])

    def bf16_ms(self, shape: tuple[int, int], rows: int) -> float:
        count = max(2, int(ROTATE // (2 * shape[0] * shape[1])) + 1)
        copies = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        return graph_ms([lambda w=w: torch.mm(x, w.T) for w in copies * max(1, 6 // count)])

    def compile(self, wanted: Sequence[tuple[Layout, Tiling]]) -> None:
        """All at once, side by side."""
        programs = self.linear._runtime.programs
        for future in [programs.start(tiling.program(self.card, layout)) for layout, tiling in wanted]:
            future.exception()

    def rows(self, layouts: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> Iterator[dict]:
        combined = list(itertools.product([layout_named(name) for name in layouts], shapes))
        self.compile([(layout, self._tiling(layout, shape, m)) for layout, shape in combined for m in rows])
        for shape in shapes:
            bf16 = {m: self.bf16_ms(shape, m) for m in rows}
            for name in layouts:
                copies = self.copies(layout_named(name), shape)
                layout = copies[0].layout
                for m in rows:
                    tiling = self._tiling(layout, shape, m)
                    floor, ms = self.ceilings.floor(layout, shape, m), self.ms(copies, m, tiling)
                    yield {
                        "format": name,
                        "shape": f"{shape[0]}x{shape[1]}",
                        "M": m,
                        "ms": ms,
                        "floor_ms": floor,
                        "ratio": ms / floor,
                        "bf16_ms": bf16[m],
                        "kernel": label(tiling),
                    }

    def _tiling(self, layout: Layout, shape: tuple[int, int], rows: int) -> Tiling:
        return self.linear.tiling(Weights(layout, shape, torch.empty(1, padded(shape[1], 512) // 64, 1)), rows)

    def tune(self, layout: Layout, shape: tuple[int, int], rows: int, more: Sequence[Tiling] = ()) -> list[dict]:
        """All candidates of a shape, the fastest first."""
        depth = padded(shape[1], 512) // 64
        tried = candidates(self.card, layout, shape[0], depth, rows)
        mine = [m.fitted(depth).on(self.card, layout) for m in more if m.rows == row_tile(rows, self.card)]
        tried += [tiling for tiling in mine if tiling is not None]
        copies, floor, found = self.copies(layout, shape), self.ceilings.floor(layout, shape, rows), []
        for tiling in dict.fromkeys(tried):
            try:
                ms = self.ms(copies, rows, tiling)
            except RuntimeError as error:
                print("failed", label(tiling), str(error)[:200], flush=True)
                continue
            found.append(
                {
                    "format": layout.name,
                    "shape": shape,
                    "M": rows,
                    "ms": ms,
                    "ratio": ms / floor,
                    "kernel": label(tiling),
                }
            )
        return sorted(found, key=lambda row: row["ms"])


def label(tiling: Tiling) -> str:
    """A tiling in a word: rows/outputs groups x K groups x blobs and what else was chosen."""
    flags = "".join(letter for letter, on in (("s", tiling.split), ("c", tiling.cluster), ("w", tiling.wgmma)) if on)
    size = f"{tiling.rows}/{tiling.groups_out}x{tiling.groups_k}x{tiling.blocks}"
    return f"{size} d{tiling.depth}u{tiling.unroll} {flags}{tiling.registers or ''}r{tiling.resident} {tiling.stages}st"


PARTS = {
    "int4": (("Int4",), LARGE + MIDDLE),
    "small": (("Int4",), SMALL),
    "bytes": (("Nf4", "Int8", "Q8_0", "Bf16"), LARGE[:1]),
    "ggml": (("Q4_0", "Q4_1", "Q5_K", "Q6_K"), LARGE[:1]),
    "floats": (("Mxfp4", "Fp8"), LARGE[:1]),
    "spqr": (("Spqr",), LARGE[:1]),
    "codebooks": (("Aqlm2x8", "Aqlm1x16"), LARGE[:1]),
}


def measure(parts: Sequence[str] | None, as_json: bool) -> None:
    """Some parts, or all; one line of JSON last if asked for."""
    from tests.bench import blocks_cuda, grouped_cuda, rivals_cuda

    others = {**blocks_cuda.PARTS, **grouped_cuda.PARTS, "rivals": rivals_cuda.rows}
    known = [*PARTS, *others]
    if unknown := sorted(set(parts or ()) - set(known)):
        raise SystemExit(f"there is no part {unknown[0]}: choose of {', '.join(known)}.")
    bench, rows = Bench(), []
    for part in parts or known:
        start = time.perf_counter()
        found = bench.rows(*PARTS[part], ROWS) if part in PARTS else others[part](bench)
        for row in found:
            rows.append(row)
            print(*(f"{v:.4f}" if isinstance(v, float) else v for v in row.values()), flush=True)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    if as_json:
        facts = {"device": torch.cuda.get_device_name(0), "gb_per_s": bench.ceilings.bytes_per_ms / 1e6}
        print(json.dumps(facts | {"tflops": bench.ceilings.flops_per_ms / 1e9, "rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", action="append", help="all, if none is named")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    arguments = parser.parse_args()
    measure(arguments.part, arguments.json)


if __name__ == "__main__":
    main()
