"""One step of the whole demo model by its number of rows, without a network: `python -m tests.bench.steps --json`.

A chain (plain transformers) or a tree (a peer's model runner) of so many rows behind a cached prompt, final norm and LM
head included, in float32 and with bfloat16 weights. All contenders take turns; the times are medians.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in a peer

import torch
from petal.kernels.registry import backend_for
from petal.peer.engine.kv_cache import KVCache
from petal.peer.engine.runner import ModelRunner, Segment
from petal.peer.model import WeightPrecision, load_span
from petal.protocol.wire.tree import RowTree, chain
from transformers import DynamicCache

from tests.support.reference import demo_checkpoint, load_reference

from .swarm import interleave, report

ROWS = (1, 8, 33, 65)
PROMPT = 200
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[int], object]  # given the number of rows


def tree(rows: int) -> RowTree:
    rng = random.Random(rows)
    return RowTree((-1, *(rng.randrange(row) for row in range(1, rows))))


def peer_step(dtype: torch.dtype) -> Step:
    """A step of a peer that hosts everything."""
    checkpoint = demo_checkpoint()
    span = load_span(checkpoint, 0, checkpoint.n_blocks, precision=WeightPrecision(dtype))
    cache = KVCache(span.backend, span.layers, 2 * PROMPT)
    runner, table, blocks = ModelRunner(span, cache), cache.open(), range(checkpoint.n_blocks)
    runner.run([Segment(table, torch.arange(PROMPT), chain(PROMPT), blocks)])
    cache.commit(table, range(PROMPT))

    def step(rows: int) -> None:
        (hidden,) = runner.run([Segment(table, torch.arange(rows), tree(rows), blocks)])
        span.logits(hidden)
        cache.commit(table, [])

    return step


def plain_step(dtype: torch.dtype) -> Step:
    model = load_reference(demo_checkpoint()).to(dtype)
    cache = DynamicCache()
    model(torch.arange(PROMPT)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(rows: int) -> None:
        model(torch.arange(rows)[None], past_key_values=cache, use_cache=True)
        cache.crop(-rows)

    return step


def seconds_of(step: Step, rows: int) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        step(rows)
        return time.perf_counter() - started

    return run


def measure(rounds: int) -> dict[str, float]:
    """Milliseconds by contender and number of rows."""
    steps = {f"peer_{name}": peer_step(dtype) for name, dtype in DTYPES.items()}
    steps |= {f"plain_{name}": plain_step(dtype) for name, dtype in DTYPES.items()}
    figures = {}
    for rows in ROWS:
        medians = interleave({name: seconds_of(step, rows) for name, step in steps.items()}, rounds)
        figures |= {f"{name}_ms_{rows}": seconds * 1e3 for name, seconds in medians.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with torch.inference_mode():
        figures = measure(options.rounds)
    names = list(dict.fromkeys(name.rpartition("_ms_")[0] for name in figures))
    table = [(name.replace("_", ", "), *(f"{figures[f'{name}_ms_{rows}']:.1f}" for rows in ROWS)) for name in names]
    facts = {"threads": torch.get_num_threads(), "bf16_arithmetic": backend_for().arithmetic(torch.bfloat16)}
    report("One step of SmolLM2-135M, ms", table, ("", *(f"{rows} rows" for rows in ROWS)), facts | figures)


if __name__ == "__main__":
    main()
