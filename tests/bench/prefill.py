"""A 1,024-token prompt through three peers: `python -m tests.bench.prefill --json`. Seconds to the first token."""

from __future__ import annotations

import argparse
import time

import torch
from petal.client.swarm import SwarmModel

from .swarm import Plain, interleave, process_swarm, report

TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    plain = Plain()
    prompt = (plain.ids * (TOKENS // len(plain.ids) + 1))[:TOKENS]

    @torch.inference_mode()
    def transformers_prefill() -> float:
        started = time.perf_counter()
        plain.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax()
        return time.perf_counter() - started

    def first_token(model: SwarmModel) -> float:
        (piece,) = model.stream(prompt, max_new_tokens=1, eos_token_id=-1)
        return piece.seconds

    with process_swarm(1) as one, process_swarm(3) as three, process_swarm(3, link_delay_ms=50) as far:
        medians = interleave(
            {
                "plain transformers": transformers_prefill,
                "one peer": lambda: first_token(one),
                "three peers": lambda: first_token(three),
                "three peers, 50 ms a link": lambda: first_token(far),
            },
            options.rounds,
        )
    base = medians["plain transformers"]
    figures = {
        "plain_s": base,
        "one_peer_s": medians["one peer"],
        "three_peers_s": medians["three peers"],
        "three_peers_50ms_s": medians["three peers, 50 ms a link"],
        "three_peers_ratio": medians["three peers"] / base,
        "over_plain_50ms_s": medians["three peers, 50 ms a link"] - base,
    }
    rows = [(name, f"{s:.2f}", f"{s / base:.2f}") for name, s in medians.items()]
    report(f"Prefill of {TOKENS} tokens, float32", rows, ("", "seconds", "ratio to plain"), figures)


if __name__ == "__main__":
    main()
