"""What the gateway costs beside a plain client: `python -m tests.bench.gateway --json`.

One peer of SmolLM2 and a gateway, each in a process of its own on this machine; the same prompts, seeds and drafts
through both, in turns. `mask_us_p50` is what a grammar's mask costs a node: computed, and applied to 49,152 scores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import httpx
import numpy as np
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.grammar.grammar import GrammarCompiler, json_grammar, masked

from .swarm import peer_processes, report

MESSAGES = [{"role": "user", "content": "Count from one to forty, in words."}]
TOKENS, STREAMS, STREAM_TOKENS = 64, 64, 12
BARS = {"overhead_ms_p50": 1.0, "ttft_extra_ms": 20.0, "throughput_ratio": 0.95, "mask_us_p50": 200.0}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
}
Times = tuple[float, float]


@contextmanager
def gateway_process(address: str) -> Iterator[str]:
    """A gateway's URL."""
    command = [sys.executable, "-c", "from petal.client.cli.main import main; main()"]
    command += ["gateway", "demo", "--initial-peers", address, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(20)


async def plainly(model: AsyncSwarmModel, tokens: int, seed: int) -> Times:
    """Seconds to the first text, and to the last."""
    began, first = time.perf_counter(), 0.0
    async for chunk in model.stream(MESSAGES, max_new_tokens=tokens, seed=seed, temperature=0.7, drafter="ngram"):
        first = first or (time.perf_counter() - began if chunk.text else 0.0)
    return first, time.perf_counter() - began


async def over_http(client: httpx.AsyncClient, tokens: int, seed: int) -> Times:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": tokens, "seed": seed}
    began, first = time.perf_counter(), 0.0
    async with client.stream(
        "POST", "/v1/chat/completions", json={**asked, "temperature": 0.7, "stream": True}
    ) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            first = first or (time.perf_counter() - began if line else 0.0)
    return first, time.perf_counter() - began


async def measure(address: str, url: str, rounds: int) -> dict[str, float]:
    model = await AsyncSwarmModel.connect("demo", [address], wait_s=20)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await plainly(model, TOKENS, 0), await over_http(client, TOKENS, 0)
        alone = [(await plainly(model, TOKENS, seed), await over_http(client, TOKENS, seed)) for seed in range(rounds)]
        rates: list[list[float]] = [[], []]
        for _ in range(2):
            for which in (0, 1):
                began = time.perf_counter()
                runs = [
                    plainly(model, STREAM_TOKENS, seed) if which == 0 else over_http(client, STREAM_TOKENS, seed)
                    for seed in range(STREAMS)
                ]
                await asyncio.gather(*runs)
                rates[which].append(STREAMS * STREAM_TOKENS / (time.perf_counter() - began))
    await model.close()
    return {
        "overhead_ms_p50": median((http[1] - http[0] - plain[1] + plain[0]) / TOKENS * 1e3 for plain, http in alone),
        "ttft_extra_ms": median((http[0] - plain[0]) * 1e3 for plain, http in alone),
        "throughput_ratio": median(rates[1]) / median(rates[0]),
    }


def mask_us() -> float:
    """Median of one node's mask along random texts of a schema."""
    with open_checkpoint("demo") as checkpoint:
        tokenizer, size = checkpoint.tokenizer(), 49152
    matcher = GrammarCompiler(tokenizer, size).compile(json_grammar(SCHEMA))
    mask, scores, rng, spent = masked(matcher, 0), np.zeros(size), np.random.default_rng(0), list[float]()
    said: list[int] = []
    while len(spent) < 500:
        values = scores.copy()
        began = time.perf_counter()
        values = mask(said, values)
        spent.append((time.perf_counter() - began) * 1e6)
        token = int(rng.choice(np.flatnonzero(np.isfinite(values))))
        said = [] if token in tokenizer.eos_ids or len(said) > 60 else [*said, token]
    return median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON line alone")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with (
        peer_processes(1, "--cache-tokens", "65536", "--max-sessions", "160") as (address, _),
        gateway_process(address) as url,
    ):
        figures = asyncio.run(measure(address, url, given.rounds))
    figures["mask_us_p50"] = mask_us()
    if given.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
        return
    rows = [(name, f"{value:.2f}", f"{BARS[name]:g}") for name, value in figures.items()]
    report("The gateway beside a plain client", rows, ("figure", "measured", "bar"), figures)


if __name__ == "__main__":
    main()
