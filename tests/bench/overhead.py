"""What the swarm costs where there is no network: `python -m tests.bench.overhead --json`.

Plain transformers, one peer and three peers decode the same tokens in turn, with the same number of threads.
A hop is arrival at a peer, where its loop has the frame, less departure from the one before, where its compute ended;
beside it stands the one-way time of bare gRPC between two processes, see `bare_stream`. A gap is from the upstream's
last compute to the downstream's first, less the time the step waited for other work.
"""

from __future__ import annotations

import argparse

from .bare_stream import one_way_ms
from .swarm import Plain, decode_seconds, interleave, percentile, process_swarm, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hops: list[float] = []
    gaps: list[float] = []
    bare: list[float] = []
    first: list[float] = []

    def three_peers() -> float:
        seconds, ttft, pieces = decode_seconds(three, options.tokens, trace=True)
        first.append(ttft)
        for piece in pieces[1:]:
            for before, after in zip(piece.hops, piece.hops[1:], strict=False):
                hops.append((after.received_ns - before.end_ns) / 1e6)
                gaps.append((after.start_ns - before.end_ns - after.queue_ns) / 1e6)
        bare.extend(one_way_ms(options.tokens))
        return seconds

    plain = Plain()
    # libgomp's own default, which our command replaces: idle threads spin for milliseconds.
    with process_swarm(1) as one, process_swarm(3) as three, process_swarm(3, GOMP_SPINCOUNT="300000") as spinning:
        medians = interleave(
            {
                "transformers generate()": lambda: plain.generate(options.tokens),
                "transformers, bare loop": lambda: plain.bare_loop(options.tokens),
                "one peer": lambda: decode_seconds(one, options.tokens)[0],
                "three peers": three_peers,
                "three peers, OpenMP's default spin": lambda: decode_seconds(spinning, options.tokens)[0],
            },
            options.rounds,
        )
    base = min(medians["transformers generate()"], medians["transformers, bare loop"])
    rows = [(name, f"{s * 1e3:.1f}", f"{1 / s:.1f}", f"{base / s:.2f}") for name, s in medians.items()]
    figures = {
        "plain_tok_s": 1 / base,
        "one_peer_tok_s": 1 / medians["one peer"],
        "three_peers_tok_s": 1 / medians["three peers"],
        "three_peers_ratio": base / medians["three peers"],
        "three_peers_default_spin_tok_s": 1 / medians["three peers, OpenMP's default spin"],
        "hop_ms_p50": percentile(hops, 0.5),
        "hop_ms_p99": percentile(hops, 0.99),
        "bare_ms_p50": percentile(bare, 0.5),
        "hop_to_bare": percentile(hops, 0.5) / percentile(bare, 0.5),
        "gap_ms_p50": percentile(gaps, 0.5),
        "ttft_ms": percentile(first, 0.5) * 1e3,
    }
    report("Decoding SmolLM2-135M, float32", rows, ("contender", "ms/token", "tokens/s", "ratio to plain"), figures)


if __name__ == "__main__":
    main()
