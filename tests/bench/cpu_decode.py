"""Decoding SmolLM2-135M by weight format, over one peer and over three: `python -m tests.bench.cpu_decode --json`.

Peers are `petal-serve --quant FORMAT` processes on this machine. For each format one peer, three peers and plain
transformers in float32 decode the same number of tokens in turn; the times are medians, and each format's ratio is to
the plain run beside it.
"""

from __future__ import annotations

import argparse
from statistics import median

from .swarm import Plain, decode_seconds, interleave, process_swarm, report

FORMATS = {
    "float32": ("--quant", "none", "--dtype", "float32"),
    "bf16": ("--quant", "none", "--dtype", "bf16"),
    **{quant: ("--quant", quant) for quant in ("int8", "int4", "nf4", "gguf")},
}


def measure(plain: Plain, options: tuple[str, ...], tokens: int, rounds: int) -> dict[str, float]:
    """Seconds a token of the three contenders."""
    with process_swarm(1, *options) as one, process_swarm(3, *options) as three:
        contenders = {
            "plain": lambda: plain.bare_loop(tokens),
            "generate": lambda: plain.generate(tokens),
            "one": lambda: decode_seconds(one, tokens)[0],
            "three": lambda: decode_seconds(three, tokens)[0],
        }
        found = interleave(contenders, rounds)
    return found | {"plain": min(found["plain"], found.pop("generate"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args()
    plain = Plain()
    runs = {
        name: measure(plain, FORMATS[name], arguments.tokens, arguments.rounds) for name in arguments.formats.split(",")
    }
    best = min(runs, key=lambda name: runs[name]["one"] / runs[name]["plain"])
    rows = [
        (name, *(f"{1 / run[who]:.1f}" for who in ("plain", "one", "three")),
         f"{run['plain'] / run['one']:.2f}", f"{run['plain'] / run['three']:.2f}")
        for name, run in runs.items()
    ]  # fmt: skip
    figures = {
        "plain_tok_s": 1 / median(run["plain"] for run in runs.values()),
        "best_format": best,
        "best_one_peer_tok_s": 1 / runs[best]["one"],
        "best_three_peers_tok_s": 1 / runs[best]["three"],
        "best_one_peer_ratio": runs[best]["plain"] / runs[best]["one"],
        "best_three_peers_ratio": runs[best]["plain"] / runs[best]["three"],
        "formats": {name: {f"{who}_tok_s": 1 / seconds for who, seconds in run.items()} for name, run in runs.items()},
    }
    columns = ("format", "plain tok/s", "one peer", "three peers", "one / plain", "three / plain")
    report("Decoding SmolLM2-135M by weight format", rows, columns, figures)


if __name__ == "__main__":
    main()
