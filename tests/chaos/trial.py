"""One trial: several clients generate, a fault strikes, and all is looked at afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from petal.client.config import GenerationConfig
from petal.client.session.failover import Failover
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel

from tests.support.random_drafter import RandomDrafter

from .cases import Case
from .plan import SILENT, Plan
from .swarm import ChaosSwarm

# Longer than any failover, restart or wait for a lost block: a generation that takes it hangs.
HANG_S = 90.0
TREE_ROOM = 128
# Tokens after a pause until the silent peer wakes, with the session still going on.
WAKES_AFTER = 6


@dataclass
class Outcome:
    """What came of a trial. `pauses_s`: the longest silence of each client whose route was hit, from the fault on."""

    seed: int
    fault: str
    identical: bool = True
    hang: bool = False
    mid_stream: bool = False
    leaks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Generation:
    """One client's stream of tokens, with the time of each piece."""

    def __init__(self, client: AsyncSwarmModel, case: Case, drafter: str, vocab: int, seed: int) -> None:
        self.said: list[int] = []
        self.times: list[float] = []
        self.events: list[Failover] = []
        self.session: Session | None = None
        self.moved = asyncio.Event()
        self._client = client
        self._case = case
        self._drafter: Any = drafter
        if drafter == "random":
            self._drafter = RandomDrafter.knowing([*case.prompt, *case.answer], vocab, seed)

    @property
    def right(self) -> bool:
        return tuple(self.said) == self._case.answer

    async def run(self) -> None:
        client, prompt = self._client, list(self._case.prompt)
        config = GenerationConfig(drafter=self._drafter, budget=6, **self._case.settings)
        reserve = len(prompt) + config.max_new_tokens + TREE_ROOM
        async with await client.open_session(reserve) as self.session:
            self.moved.set()
            async for piece in await client.generator.chunks(self.session, prompt, config):
                self.said += piece.ids
                self.events += piece.events
                self.times.append(time.monotonic())
                self.moved.set()

    async def until(self, tokens: int) -> None:
        """Wait until it has said so many."""
        while self.session is None or len(self.said) < tokens:
            self.moved.clear()
            await self.moved.wait()

    def pause_after(self, moment: float) -> float:
        """The longest time without a token from that moment on."""
        stamps = [moment, *(stamp for stamp in self.times if stamp > moment)]
        return max((b - a for a, b in pairwise(stamps)), default=0.0)


async def run_trial(swarm: ChaosSwarm, cases: Sequence[Case], plan: Plan) -> Outcome:
    """The swarm is as before when it returns, or it is of no use any more and this raises."""
    started = time.monotonic()
    outcome = Outcome(plan.seed, plan.fault)
    runs = [
        Generation(client, cases[visit.case], visit.drafter, swarm.model.vocab, plan.seed)
        for client, visit in zip(swarm.clients, plan.visits, strict=True)
    ]
    tasks = [asyncio.create_task(run.run()) for run in runs]
    hit: list[int] = []
    try:
        hit = await asyncio.wait_for(_strike(swarm, plan, runs, outcome), HANG_S)
        _, late = await asyncio.wait(tasks, timeout=HANG_S)
    finally:
        for task in tasks:
            task.cancel()
        failures = await asyncio.gather(*tasks, return_exceptions=True)
    outcome.hang = bool(late)
    outcome.wrong += [f"client {n}: {failure!r}" for n, failure in enumerate(failures) if failure is not None]
    outcome.identical = all(run.right for run in runs)
    await _look_around(swarm, plan, hit, outcome)
    outcome.seconds = time.monotonic() - started
    return outcome


async def _strike(swarm: ChaosSwarm, plan: Plan, runs: Sequence[Generation], outcome: Outcome) -> list[int]:
    """Hit the first client's route when it is where the plan says; returns the numbers of the peers hit."""
    first = runs[0]
    await first.until(plan.at_token)
    await asyncio.sleep(plan.delay_s)
    assert first.session is not None
    route = [swarm.number_of(stop.peer.peer_id) for stop in first.session.route]
    hit = [0] if plan.fault == "bootstrap" else [route[place] for place in plan.places]
    on_route = [run for run in runs if run.session and {s.peer.peer_id for s in run.session.route} & _ids(swarm, hit)]
    before, moment = len(first.said), time.monotonic()
    await swarm.inject(plan.fault, hit)
    outcome.mid_stream = before < len(first._case.answer)
    if plan.fault == "restart":
        await swarm.restart(hit[0])
    if plan.fault in SILENT:
        # It wakes while its session goes on elsewhere: nothing of it may be heard.
        await first.until(min(len(first._case.answer), before + WAKES_AFTER))
        for number in hit:
            swarm.relent(number)
    await asyncio.gather(*(run.until(len(run._case.answer)) for run in on_route))
    outcome.pauses_s = [run.pause_after(moment) for run in on_route]
    return hit


def _ids(swarm: ChaosSwarm, numbers: Sequence[int]) -> set[str]:
    return {swarm.peers[number].peer_id for number in numbers}


async def _look_around(swarm: ChaosSwarm, plan: Plan, hit: Sequence[int], outcome: Outcome) -> None:
    gone = hit if plan.fault in ("kill", "two", "bootstrap", "drain") else []
    for number in gone:
        peer = swarm.peers[number]
        if not await peer.ended(25.0):
            outcome.leaks.append(f"processes of peer {number} are left")
            peer.destroy()
        elif plan.fault == "drain" and peer.exitcode != 0:
            outcome.wrong.append(f"the drained peer {number} ended with code {peer.exitcode}")
    outcome.wrong += await swarm.inconsistencies(gone)
    for number in hit:
        swarm.relent(number)
    outcome.leaks += await swarm.leaks(but=gone)
    await swarm.heal(hit)
