"""One peer, many clients: `python -m tests.bench.concurrency --json`. `ms` is between two tokens of a client."""

from __future__ import annotations

import argparse
import asyncio
import time
from itertools import pairwise

from petal.client.swarm import AsyncSwarmModel

from .swarm import PROMPT, Plain, console, percentile, process_swarm, report

CLIENTS = (1, 4, 16, 64)


async def gaps_of_one(model: AsyncSwarmModel, prompt: list[int], tokens: int, seed: int) -> list[float]:
    """Seconds between tokens, from the second on."""
    stamps = []
    async for _ in model.stream(prompt, max_new_tokens=tokens, seed=seed, eos_token_id=-1, drafter="none"):
        stamps.append(time.perf_counter())
    return [b - a for a, b in pairwise(stamps[1:])]


async def load(address: str, clients: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens a second of all clients while all decode, and the gaps between tokens."""
    model = await AsyncSwarmModel.connect("demo", [address])
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    gaps = await asyncio.gather(*(gaps_of_one(model, prompt, tokens, seed) for seed in range(clients)))
    await model.close()
    flat = sorted(gap for each in gaps for gap in each)
    return clients / (sum(flat) / len(flat)), flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    plain = Plain()
    speeds: dict[str, list[float]] = {"plain": [], **{str(n): [] for n in CLIENTS}}
    gaps: dict[int, list[float]] = {n: [] for n in CLIENTS}
    with process_swarm(1, "--cache-tokens", "32768", "--max-sessions", "80") as model:
        address = model.route()[0].peer.addresses[0]
        for turn in range(options.rounds + 1):
            speed = 1 / min(plain.generate(options.tokens), plain.bare_loop(options.tokens))
            if turn:
                speeds["plain"].append(speed)
            for clients in CLIENTS:
                speed, measured = asyncio.run(load(address, clients, options.tokens))
                if turn:
                    speeds[str(clients)].append(speed)
                    gaps[clients] += measured
            console.print(f"[dim]round {turn} of {options.rounds}[/dim]")
    best = {name: percentile(values, 0.5) for name, values in speeds.items()}
    figures = {f"tok_s_{n}": best[str(n)] for n in CLIENTS}
    figures |= {f"{name}_ms_16": percentile(gaps[16], share) * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))}
    figures |= {
        "plain_tok_s": best["plain"],
        "speedup_16": best["16"] / best["1"],
        "share_1": best["1"] / best["plain"],
    }
    rows = [("plain transformers", f"{best['plain']:.1f}", "", "")]
    for n in CLIENTS:
        p50, p99 = (percentile(gaps[n], share) * 1e3 for share in (0.5, 0.99))
        rows.append((f"{n} clients", f"{best[str(n)]:.1f}", f"{p50:.1f}", f"{p99:.1f}"))
    report("One peer, float32", rows, ("", "tokens/s", "p50 ms", "p99 ms"), figures)


if __name__ == "__main__":
    main()
