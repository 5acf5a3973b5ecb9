"""One swarm of its own that runs its share of the trials, one after the other."""

from __future__ import annotations

import asyncio
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .cases import Case, Model
from .plan import plan
from .swarm import SPANS, chaos_swarm
from .trial import Outcome, run_trial


def work(
    model: Model,
    cases: Sequence[Case],
    seeds: Sequence[int],
    hosts: int,
    clients: int,
    report: Callable[[Outcome], None],
) -> None:
    """Run the trials of these seeds; `report` hears of each."""
    asyncio.run(_work(model, cases, list(seeds), hosts, clients, report))


async def _work(
    model: Model,
    cases: Sequence[Case],
    seeds: list[int],
    hosts: int,
    clients: int,
    report: Callable[[Outcome], None],
) -> None:
    tokens = len(cases[0].answer)
    while seeds:
        with tempfile.TemporaryDirectory(prefix="petal-chaos-") as folder:
            async with chaos_swarm(model, hosts, clients, Path(folder)) as swarm:
                while seeds:
                    seed = seeds.pop(0)
                    try:
                        outcome = await run_trial(swarm, cases, plan(seed, tokens, len(cases), clients, SPANS))
                    except Exception:
                        # The swarm may be beyond repair: the next trial gets a new one.
                        trial = plan(seed, tokens, len(cases), clients, SPANS)
                        report(Outcome(seed, trial.fault, identical=False, wrong=[traceback.format_exc()]))
                        break
                    report(outcome)
