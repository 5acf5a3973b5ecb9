"""Random load for minutes, half the clients vanish: `python -m tests.bench.soak --json --minutes 5`.

Afterwards every page must be free again, memory must not have grown, and every answer that was awaited must be right.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import psutil
from petal.client.session.peer_error import PeerError

from tests.support.swarms import LocalSwarm, local_swarm, spans
from tests.support.tiny import VOCAB, tiny_llama

from .swarm import report

CLIENTS = 12
WARM_UP_SHARE = 0.25


class Load:
    """Clients that come, generate, and leave politely or not."""

    def __init__(self, swarm: LocalSwarm, seed: int) -> None:
        self.swarm = swarm
        self.rng = random.Random(seed)
        self.expected: dict[tuple[int, ...], list[int]] = {}
        self.finished = self.vanished = self.refused = self.errors = 0

    async def client(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            try:
                await self._visit()
            except PeerError as error:
                self.refused += error.busy
                self.errors += not error.busy

    async def _visit(self) -> None:
        rng = self.rng
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 40, 200]))]
        tokens, vanishes = rng.randint(1, 60), rng.random() < 0.5
        async with self.swarm.connect() as model:
            stream = model.stream(prompt, max_new_tokens=tokens, eos_token_id=-1)
            said: list[int] = []
            async for piece in stream:
                said += piece.ids
                if vanishes and rng.random() < 0.1:
                    self.vanished += 1
                    return  # the connection closes with a step under way
            self.finished += 1
            self.errors += len(said) != tokens


async def soak(minutes: float, seed: int) -> dict[str, float]:
    process = psutil.Process()
    async with local_swarm(tiny_llama(), spans(4, 2), max_sessions=8, cache_tokens=4096) as swarm:
        load = Load(swarm, seed)
        started = time.monotonic()
        await _run(load, started + minutes * 60 * WARM_UP_SHARE)
        warm = process.memory_info().rss
        await _run(load, started + minutes * 60)
        await asyncio.sleep(1)
        growth = (process.memory_info().rss - warm) / 1e6
        leaked = sum(p.engine.cache.n_pages - p.engine.cache.free_pages for p in swarm.peers)
    return {
        "leaked_pages": leaked,
        "rss_growth_mb": growth,
        "errors": load.errors,
        "finished": load.finished,
        "vanished": load.vanished,
        "refused": load.refused,
    }


async def _run(load: Load, deadline: float) -> None:
    await asyncio.gather(*(load.client(deadline) for _ in range(CLIENTS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = asyncio.run(soak(options.minutes, options.seed))
    rows = [(name, f"{value:.1f}") for name, value in figures.items()]
    report(f"Soak of {options.minutes:g} minutes", rows, ("", ""), figures)


if __name__ == "__main__":
    main()
