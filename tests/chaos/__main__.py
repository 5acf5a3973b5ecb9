"""`python -m tests.chaos --trials 300 --seed 1 --workers 4 --json`: faults in the middle of generations.

Every worker has a swarm of real peer processes, each behind an emulated link, and several clients. In a trial one fault
strikes the first client's route at a random moment; all answers must be those of an undisturbed peer. A trial that
fails prints its seed: `--trials 1 --seed THAT` runs it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .cases import MODELS, Case, Model, answered_cases
from .plan import ABRUPT, FAULTS, SILENT
from .trial import Outcome
from .worker import work

console = Console(stderr=True)
STOP_S = 60.0


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next has the next")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--tokens", type=int, default=64, help="of each generation")
    parser.add_argument("--hosts", type=int, default=3, help="peers of each span")
    parser.add_argument("--clients", type=int, default=2, help="that generate at the same time")
    parser.add_argument("--workers", type=int, default=1, help="swarms side by side")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    options = parser.parse_args(arguments)
    model = MODELS[options.model]()
    cases = asyncio.run(answered_cases(model, options.tokens))
    seeds = range(options.seed, options.seed + options.trials)
    outcomes = []
    for outcome in run(model, cases, seeds, options):
        outcomes.append(outcome)
        tell(outcome, len(outcomes), options.trials)
    print_table(outcomes)
    figures = summary(outcomes)
    print(json.dumps(figures))
    return figures


def run(model: Model, cases: Sequence[Case], seeds: range, options: argparse.Namespace) -> Iterator[Outcome]:
    """Outcomes as they come. Every worker is a process."""
    context = multiprocessing.get_context("spawn")
    reports: Any = context.SimpleQueue()
    shares = [list(seeds[first :: options.workers]) for first in range(min(options.workers, len(seeds)))]
    counts = options.hosts, options.clients
    processes = [context.Process(target=work, args=(model, cases, share, *counts, reports.put)) for share in shares]
    for process in processes:
        process.start()
    try:
        for _ in seeds:
            while reports.empty():
                if not any(process.is_alive() for process in processes):
                    return
                processes[0].join(0.05)
            yield reports.get()
    finally:
        for process in processes:
            process.join(STOP_S)  # it ends its peers first
            process.kill()


def tell(outcome: Outcome, count: int, trials: int) -> None:
    """One line a trial; all that is known of one that failed."""
    good = outcome.identical and not (outcome.hang or outcome.leaks or outcome.wrong) and outcome.mid_stream
    pause = max(outcome.pauses_s, default=0.0)
    style = "dim" if good else "red"
    console.print(
        f"[{style}]{count}/{trials} seed {outcome.seed} {outcome.fault}: {'good' if good else 'FAILED'}, "
        f"pause {pause:.2f} s, {outcome.seconds:.1f} s[/{style}]",
        highlight=False,
    )
    if not good:
        print(f"seed {outcome.seed}: {outcome}", file=sys.stderr)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    abrupt = [pause for outcome in outcomes if outcome.fault in ABRUPT for pause in outcome.pauses_s]
    silent = [pause for outcome in outcomes if outcome.fault in SILENT for pause in outcome.pauses_s]
    return {
        "trials": len(outcomes),
        "identical": sum(outcome.identical for outcome in outcomes),
        "hangs": sum(outcome.hang for outcome in outcomes),
        "leaks": sum(bool(outcome.leaks) for outcome in outcomes),
        "wrong": sum(bool(outcome.wrong) for outcome in outcomes),
        "mid_stream": sum(outcome.mid_stream for outcome in outcomes),
        "kill_pause_p50_s": percentile(abrupt, 0.5),
        "kill_pause_p99_s": percentile(abrupt, 0.99),
        "silent_pause_p50_s": percentile(silent, 0.5),
        "silent_pause_p99_s": percentile(silent, 0.99),
    }


def print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table(
        "fault", "trials", "identical", "pause p50", "p99", title="Faults in mid-stream", title_justify="left"
    )
    for fault in FAULTS:
        those = [outcome for outcome in outcomes if outcome.fault == fault]
        pauses = [pause for outcome in those for pause in outcome.pauses_s]
        if those:
            table.add_row(
                fault,
                str(len(those)),
                str(sum(outcome.identical for outcome in those)),
                f"{percentile(pauses, 0.5):.2f} s",
                f"{percentile(pauses, 0.99):.2f} s",
            )
    Console().print(table)


def percentile(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3) if values else 0.0


if __name__ == "__main__":
    main()
