"""The budget controller on simulated routes: it finds the best K, falls back to plain steps, and stays where it is."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass

import pytest
from petal.client.drafting.budget import LADDER, AcceptanceCurve, BudgetController, Line, Round

from ...support.reference import DATA


@dataclass
class Route:
    """Times in seconds; a node of rank r is accepted with chance `quality` / r."""

    plain: float
    fixed: float
    slope: float
    level: float
    quality: float
    noise: float = 0.1

    def round(self, budget: int, rng: random.Random) -> Round:
        accepted = [rank for rank in range(1, budget + 1) if rng.random() < self.quality / rank]
        seconds = self.fixed + self.slope * budget if budget else self.plain
        return Round(budget, budget, accepted, self.draft(budget), seconds * (1 + abs(rng.gauss(0, self.noise))))

    def draft(self, budget: int) -> float:
        return self.level * budget**0.5

    def rate(self, budget: int) -> float:
        """Tokens a second in the long run."""
        tokens = 1 + sum(self.quality / rank for rank in range(1, budget + 1))
        seconds = self.fixed + self.slope * budget if budget else self.plain
        return tokens / (seconds + self.draft(budget))

    @property
    def best(self) -> float:
        return max(map(self.rate, LADDER))


def play(controller: BudgetController, route: Route, rounds: int, rng: random.Random) -> list[int]:
    budgets = []
    for _ in range(rounds):
        budgets.append(controller.budget)
        controller.observe(route.round(budgets[-1], rng))
    return budgets


def mean_rate(route: Route, budgets: list[int]) -> float:
    """Tokens a second of these rounds in the mean over luck."""
    tokens = sum(route.rate(k) * _seconds(route, k) for k in budgets)
    return tokens / sum(_seconds(route, k) for k in budgets)


def _seconds(route: Route, budget: int) -> float:
    return (route.fixed + route.slope * budget if budget else route.plain) + route.draft(budget)


class RecordedRoute:
    """Rounds of SmolLM2 with its drafter over three peers, by their budget; each is played again in turn."""

    def __init__(self, rounds: dict[str, list[list]]) -> None:
        """rounds: nodes, rows accepted, seconds drafting, seconds verifying."""
        self._rounds = {
            int(budget): [Round(int(budget), *values) for values in each] for budget, each in rounds.items()
        }
        self._next = {budget: itertools.cycle(each) for budget, each in self._rounds.items()}

    def round(self, budget: int) -> Round:
        """The next one recorded, of the budget that comes closest; plain steps and drafts are not mixed."""
        return next(self._next[min(self._next, key=lambda k: (bool(k) != bool(budget), abs(k - budget)))])

    @property
    def best(self) -> float:
        return max(map(rate_of, self._rounds.values()))


def rate_of(rounds: list[Round]) -> float:
    """Tokens a second; an accepted list holds no row 0, in whose place comes the bonus token."""
    return sum(1 + len(r.accepted) for r in rounds) / sum(r.draft_s + r.verify_s for r in rounds)


RECORDED = json.loads((DATA / "rounds.json").read_text())
WAN = Route(plain=0.10, fixed=0.11, slope=0.001, level=0.004, quality=0.6)
FAR = Route(plain=0.29, fixed=0.30, slope=0.001, level=0.004, quality=0.6)
NEAR = Route(plain=0.037, fixed=0.062, slope=0.0012, level=0.004, quality=0.6)
USELESS = Route(plain=0.028, fixed=0.06, slope=0.004, level=0.01, quality=0.1)
CHEAP = Route(plain=0.05, fixed=0.05, slope=0.00002, level=0.0, quality=0.8)


@pytest.mark.parametrize("route", [WAN, FAR, NEAR, USELESS, CHEAP], ids=["wan", "far", "near", "useless", "cheap"])
@pytest.mark.parametrize("seed", range(6))
def test_it_comes_close_to_the_best_budget(route: Route, seed: int) -> None:
    budgets = play(BudgetController(), route, 400, random.Random(seed))
    assert mean_rate(route, budgets[100:]) > 0.85 * route.best
    assert mean_rate(route, budgets) > 0.94 * route.rate(0), "drafting must not lose against plain steps"


@pytest.mark.parametrize("route", [WAN, FAR, NEAR, USELESS], ids=["wan", "far", "near", "useless"])
def test_it_does_not_oscillate(route: Route) -> None:
    """The budget settles; single rounds that try a neighbour or the other side are few."""
    for seed in range(6):
        controller, rng = BudgetController(), random.Random(seed)
        play(controller, route, 200, rng)
        settled, tried = [], 0
        for _ in range(300):
            settled.append(controller._budget)
            tried += controller.budget != controller._budget
            play(controller, route, 1, rng)
        assert sum(a != b for a, b in itertools.pairwise(settled)) <= 12
        assert tried <= 40


@pytest.mark.parametrize(("before", "after"), [(NEAR, FAR), (FAR, NEAR), (WAN, USELESS), (USELESS, WAN)])
def test_it_follows_a_route_whose_latency_jumps(before: Route, after: Route) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        controller = BudgetController()
        play(controller, before, 150, rng)
        play(controller, after, 60, rng)  # time to notice
        budgets = play(controller, after, 300, rng)
        assert mean_rate(after, budgets) > 0.8 * after.best


def test_one_late_answer_changes_nothing() -> None:
    rng, controller = random.Random(3), BudgetController()
    before = play(controller, WAN, 200, rng)[-1]
    controller.observe(Round(before, before, [], 0.01, 3.0))
    assert controller.budget > 0
    after = play(controller, WAN, 100, rng)
    assert mean_rate(WAN, after) > 0.85 * WAN.best


def test_it_never_asks_for_more_than_peers_take() -> None:
    assert max(play(BudgetController(most=8), CHEAP, 100, random.Random(0))) <= 8
    assert set(play(BudgetController(most=0), CHEAP, 50, random.Random(0))) == {0}


def test_drafters_that_find_nothing_cost_nothing() -> None:
    """N-grams often have no guess: such rounds are plain steps, whatever the budget."""
    controller = BudgetController()
    for _ in range(100):
        controller.observe(Round(controller.budget, 0, [], 1e-5, 0.1))
    assert controller.tokens_per_s(controller.budget) == pytest.approx(10, rel=0.1)


def test_a_line_is_fitted_and_never_falls() -> None:
    rng, line = random.Random(0), Line(doubling=64)
    for _ in range(300):
        nodes = rng.choice([4, 16, 32, 64])
        line.observe(nodes, 0.1 + 0.002 * nodes + rng.gauss(0, 0.004))
    assert line.seconds(0) == pytest.approx(0.1, rel=0.1)
    assert line.slope == pytest.approx(0.002, rel=0.2)
    for _ in range(100):
        line.observe(64, 0.05)
        line.observe(4, 0.2)
    assert line.slope == 0


def test_the_acceptance_curve_learns_each_rank() -> None:
    rng, curve = random.Random(0), AcceptanceCurve()
    for _ in range(400):
        curve.observe(16, 16, [r for r in range(1, 17) if rng.random() < 0.7 / r])
    expected = 1 + sum(0.7 / r for r in range(1, 17))
    assert curve.tokens(16) == pytest.approx(expected, rel=0.15)
    assert curve.tokens(64) > curve.tokens(16), "ranks that were never tried still promise something"
    assert curve.nodes(16)[0] == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("route", RECORDED)
def test_recorded_rounds_of_real_routes(route: str) -> None:
    """It finds what was best there, and stays."""
    recorded, controller = RecordedRoute(RECORDED[route]), BudgetController()
    played, budgets = [], []
    for _ in range(300):
        budgets.append(controller._budget)
        played.append(recorded.round(controller.budget))
        controller.observe(played[-1])
    assert rate_of(played[100:]) > 0.93 * recorded.best
    assert sum(a != b for a, b in itertools.pairwise(budgets[100:])) <= 12
