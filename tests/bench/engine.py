"""Inside one peer: `python -m tests.bench.engine --json`.

How far the event loop lags while the compute thread is saturated, what a long prompt does to another session's decode
steps, what exact mode costs, and how many sessions a GiB of cache holds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from petal.client.swarm import AsyncSwarmModel
from petal.peer.engine.page_table import PAGE

from tests.support.swarms import LocalSwarm, local_swarm, spans

from .swarm import percentile, report

LONG_PROMPT = 8000
TICK_S = 0.005


async def lag(stop: asyncio.Event) -> list[float]:
    """Milliseconds by which a timer of the peer's loop is late."""
    late = []
    while not stop.is_set():
        due = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late.append((time.perf_counter() - due) * 1e3)
    return late


async def decode_gaps(model: AsyncSwarmModel, tokens: int, seed: int = 0) -> list[float]:
    """Milliseconds between the tokens of one session."""
    stamps = []
    async for _ in model.stream(list(range(40)), max_new_tokens=tokens, seed=seed, eos_token_id=-1, drafter="none"):
        stamps.append(time.perf_counter())
    return [(b - a) * 1e3 for a, b in pairwise(stamps[1:])]


async def loop_lag(swarm: LocalSwarm, clients: int, tokens: int) -> list[float]:
    stop = asyncio.Event()
    watching = asyncio.create_task(lag(stop))
    async with swarm.connect() as model:
        await asyncio.gather(*(decode_gaps(model, tokens, seed) for seed in range(clients)))
    stop.set()
    return await watching


async def beside_a_long_prompt(swarm: LocalSwarm, tokens: int) -> tuple[list[float], list[float]]:
    """Gaps of one session alone, and while another prefills LONG_PROMPT tokens."""
    async with swarm.connect() as model, swarm.connect() as other:
        alone = await decode_gaps(model, tokens)
        prompt = [i % 1000 for i in range(LONG_PROMPT)]
        session = await other.open_session(LONG_PROMPT + 16)
        prefilling = asyncio.create_task(session.prefill(prompt))
        await asyncio.sleep(0.2)
        beside: list[float] = []
        while not prefilling.done() and len(beside) < 4 * tokens:
            beside += await decode_gaps(model, tokens)
        prefilling.cancel()
        session.close()
    return alone, beside


def sessions_per_gib(swarm: LocalSwarm, length: int) -> float:
    pool = swarm.peers[0].engine.cache
    page = pool.storage.page_nbytes
    return 2**30 / (page * -(-length // PAGE))


async def decode_speed(exact: bool, tokens: int) -> float:
    async with local_swarm("demo", spans(30, 1), exact=exact) as swarm, swarm.connect(exact=exact) as model:
        return percentile(await decode_gaps(model, tokens), 0.5)


async def prefill_speed(exact: bool) -> float:
    async with local_swarm("demo", spans(30, 1), exact=exact) as swarm, swarm.connect(exact=exact) as model:
        times = []
        for _ in range(3):
            session = await model.open_session(1100)
            started = time.perf_counter()
            await session.prefill([i % 1000 for i in range(1024)])
            times.append(time.perf_counter() - started)
            session.close()
        return percentile(times, 0.5) * 1e3


async def measure(tokens: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    figures: dict[str, Any] = {}
    async with local_swarm("demo", spans(30, 1), cache_tokens=20480) as swarm:
        late = await loop_lag(swarm, 16, tokens)
        alone, beside = await beside_a_long_prompt(swarm, tokens)
        figures["loop_lag_ms_p50"], figures["loop_lag_ms_p99"] = percentile(late, 0.5), percentile(late, 0.99)
        figures["decode_ms_p99_alone"], figures["decode_ms_p99_beside"] = (
            percentile(alone, 0.99),
            percentile(beside, 0.99),
        )
        figures["beside_ratio"] = figures["decode_ms_p99_beside"] / figures["decode_ms_p99_alone"]
        for length in (128, 4096):
            figures[f"sessions_per_gib_{length}"] = sessions_per_gib(swarm, length)
    for name, run in (("decode", lambda exact: decode_speed(exact, tokens)), ("prefill", prefill_speed)):
        turns = {False: [], True: []}  # type: dict[bool, list[float]]
        for _ in range(2):
            for exact in turns:
                torch.set_num_threads(threads)
                turns[exact].append(await run(exact))
        torch.set_num_threads(threads)
        figures[f"exact_{name}_ratio"] = min(turns[True]) / min(turns[False])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    figures = asyncio.run(measure(options.tokens))
    report("Inside one peer", [(name, f"{value:.2f}") for name, value in figures.items()], ("", ""), figures)


if __name__ == "__main__":
    main()
