"""Decoding over long links: `python -m tests.bench.wan --json`.

Three peers, each behind an emulated link; a token crosses four of them: client, head, middle, tail, client. The ideal
is plain transformers' time for a token, measured in the same run, plus four one-way delays.
"""

from __future__ import annotations

import argparse

from .swarm import Plain, decode_seconds, interleave, process_swarm, report

DELAYS_MS = (0.0, 12.5, 50.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    plain = Plain()
    swarms = [process_swarm(3, link_delay_ms=delay) for delay in DELAYS_MS]
    with swarms[0] as at_0, swarms[1] as at_12, swarms[2] as at_50:
        models = dict(zip(DELAYS_MS, (at_0, at_12, at_50), strict=True))
        contenders = {"plain": lambda: min(plain.generate(options.tokens), plain.bare_loop(options.tokens))}
        for delay, model in models.items():
            contenders[f"{delay:g} ms"] = lambda model=model: decode_seconds(model, options.tokens)[0]
        medians = interleave(contenders, options.rounds)
    rows, figures = [], {"plain_tok_s": 1 / medians["plain"]}
    for delay in DELAYS_MS:
        seconds, ideal = medians[f"{delay:g} ms"], medians["plain"] + 4 * delay / 1e3
        rows.append((f"{delay:g}", f"{1 / seconds:.2f}", f"{1 / ideal:.2f}", f"{ideal / seconds:.3f}"))
        name = f"{delay:g}".split(".")[0]
        figures |= {f"tok_s_{name}": 1 / seconds, f"ideal_{name}": 1 / ideal, f"share_{name}": ideal / seconds}
    report("Three peers, one-way delay a link", rows, ("delay ms", "tokens/s", "ideal", "share of ideal"), figures)


if __name__ == "__main__":
    main()
