"""Rounds of one generation: draft a tree, let the chain verify it, draft on meanwhile, learn from what came back."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ...protocol.grammar.grammar import GrammarMatcher
from ...protocol.wire.sampling import SamplingParams
from .budget import BudgetController, Round
from .drafter import Drafter, ScoredTree, merge
from .grammar import pruned

if TYPE_CHECKING:
    from ..session.result import OutputOptions, StepResult
    from ..session.session import Session

log = logging.getLogger(__name__)
T = TypeVar("T")


@functools.cache
def _draft_thread() -> ThreadPoolExecutor:
    """One for the process: drafts share its cores, and the event loop must go on."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="petal-draft")


@dataclass(frozen=True)
class Verified:
    """What came of a round: the last stage's answer, the nodes drafted and the time that they took, in seconds."""

    result: StepResult
    nodes: int = 0
    draft_s: float = 0.0


class Speculation:
    """Drafters of one sequence and the budget of its route. Without drafters every round is a plain step."""

    def __init__(
        self, drafters: Sequence[Drafter] = (), controller: BudgetController | None = None, budget: int | None = None
    ) -> None:
        """`budget` fixes the number of nodes; None leaves it to the controller."""
        self._drafters = list(drafters)
        self._controller = controller or BudgetController()
        self._fixed = budget
        self._heavy = any(drafter.heavy for drafter in drafters)
        self._grammar: GrammarMatcher | None = None
        self._prompt_length = 0

    def start(self, prompt: Sequence[int], sampling: SamplingParams, grammar: GrammarMatcher | None = None) -> None:
        """An answer to `prompt` begins; nothing is drafted that the grammar forbids in it."""
        self._grammar, self._prompt_length = grammar, len(prompt)
        for drafter in self._drafters:
            drafter.start(prompt, sampling)

    async def round(self, session: Session, ids: Sequence[int], room: int, output: OutputOptions) -> Verified:
        """One trip. `ids` are prompt and output so far; at most `room` drafted tokens could be used."""
        if not self._drafters:
            return Verified(await session.step(ScoredTree.root(ids[-1]), output=output))
        budget = min(self._budget(session), room)
        started = time.perf_counter()
        tree = await self._run(self._propose, ids, budget) if budget > 0 else ScoredTree.root(ids[-1])
        drafted = time.perf_counter()
        result = await self._verify(session, tree, output)
        done = Round(budget, len(tree) - 1, result.accepted[1:], drafted - started, time.perf_counter() - drafted)
        self._controller.observe(done)
        return Verified(result, done.nodes, done.draft_s)

    def _budget(self, session: Session) -> int:
        most = session.max_nodes
        if self._fixed is None:
            return min(self._controller.budget, most)
        if self._fixed > most:
            log.warning("a budget of %d nodes is more than the route's peers take; it is now %d", self._fixed, most)
            self._fixed = most
        return self._fixed

    def _propose(self, ids: Sequence[int], budget: int) -> ScoredTree:
        rate = 0.0 if self._fixed is not None else self._controller.tokens_per_s(budget)
        trees = [drafter.propose(ids, budget, drafter.level_s * rate) for drafter in self._drafters]
        tree = merge(trees, budget)
        return pruned(tree, self._grammar, ids[self._prompt_length :]) if self._grammar else tree

    async def _verify(self, session: Session, tree: ScoredTree, output: OutputOptions) -> StepResult:
        if not self._heavy or len(tree) == 1:
            return await session.step(tree, output=output)
        answered = threading.Event()
        drafting = asyncio.ensure_future(self._run(self._draft_ahead, answered))
        try:
            return await session.step(tree, output=output)
        finally:
            answered.set()
            await drafting

    def _draft_ahead(self, answered: threading.Event) -> None:
        for drafter in self._drafters:
            while not answered.is_set() and drafter.ahead():
                pass

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        """On the drafting thread where a model drafts; at once where drafting takes microseconds."""
        if not self._heavy:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(_draft_thread(), work, *arguments)
