"""How many nodes to draft: the budget K with the most tokens a second, from what rounds have shown so far.

tokens/s = E(K) / (draft(K) + verify(K)). Both times are lines, fixed + slope * K, fitted for one route with forgetting;
E(K) is the acceptance curve: the chance that the node of each rank in the draft is accepted, summed up to K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# With row 0, multiples of the 16 rows that a matrix unit takes at a time; 33 rows cost as much as 48.
LADDER = (0, 2, 4, 7, 11, 15, 23, 31, 47, 63, 95, 127)
FIRST = 15
# A round counts for so much of the one after it.
KEEP_TIMES = 0.92
KEEP_RARE = 0.6  # of plain steps, where most rounds draft
KEEP_RANKS = 0.98
# One answer that is late counts as so many times what was expected; a slower route shows it again.
LATE = 3.0
# Another budget must promise so much more, or noise would move it to and fro.
GAIN = 1.06
# Rounds until the losing side, drafting or plain steps, is tried again; doubled each time it loses again.
PATIENCE_FIRST, PATIENCE_AFTER_CHANGE = 2, 8
# A plain step among drafts costs little, a draft that fails costs a round.
PATIENCE_DRAFTING, PATIENCE_PLAIN = 48, 256
# Every so many rounds a neighbour on the ladder is tried, since rounds of one size show no slope.
NEIGHBOUR = 12


class Line:
    """seconds = fixed + slope * nodes: least squares with forgetting, never falling.

    Until sizes differ, `doubling` is taken for the number of nodes that double the time of none.
    """

    def __init__(self, doubling: float, keep: float = KEEP_TIMES) -> None:
        """`keep`: what an observation counts for once another one came."""
        self._doubling = doubling
        self._keep = keep
        self._weight = self._nodes = self._seconds = 0.0  # the weighted means
        self._nn = self._ns = 0.0  # and second moments around them
        self.slope = 0.0

    @property
    def known(self) -> bool:
        return self._weight > 0

    def observe(self, nodes: int, seconds: float) -> None:
        if not self.known:
            self.slope = seconds / (self._doubling + nodes)
        elif self._weight > 2:
            seconds = min(seconds, LATE * self.seconds(nodes))
        weight = self._keep * self._weight
        self._weight = weight + 1
        dn, ds = nodes - self._nodes, seconds - self._seconds
        self._nodes += dn / self._weight
        self._seconds += ds / self._weight
        self._nn = self._keep * self._nn + dn * (nodes - self._nodes)
        self._ns = self._keep * self._ns + dn * (seconds - self._seconds)
        # Rounds of nearly one size say little about the slope: then the old one stands.
        self.slope = max(0.0, (self._ns + 4 * self.slope) / (self._nn + 4))

    def seconds(self, nodes: float) -> float:
        return max(self._seconds + self.slope * (nodes - self._nodes), 0.25 * self._seconds)


class AcceptanceCurve:
    """How often the node of each rank is drafted and accepted. Ranks that were never tried follow a power law."""

    def __init__(self) -> None:
        ranks = np.arange(1, LADDER[-1] + 1)
        self._law = 0.6 / ranks
        self._tried = np.zeros(len(ranks))
        self._drafted = np.zeros(len(ranks))
        self._hit = np.zeros(len(ranks))

    def observe(self, budget: int, nodes: int, accepted: list[int]) -> None:
        """A round that asked for `budget` nodes, got `nodes`, and had these rows (from 1) accepted."""
        for counts in (self._tried, self._drafted, self._hit):
            counts *= KEEP_RANKS
        self._tried[:budget] += 1
        self._drafted[:nodes] += 1
        self._hit[[row - 1 for row in accepted if row <= len(self._hit)]] += 1

    def tokens(self, budget: int) -> float:
        """E(K): tokens that a round of this budget brings, the bonus token included."""
        scale = (self._hit.sum() + 5) / ((self._tried * self._law).sum() + 5)
        chance = (self._hit + 2 * scale * self._law) / (self._tried + 2)
        return 1 + float(chance[:budget].sum())

    def nodes(self, budget: int) -> tuple[float, float]:
        """Nodes that such a budget is used for in the mean, and the share of rounds that draft any."""
        share = (self._drafted + 1) / (self._tried + 1)
        return float(share[:budget].sum()), float(share[0])


@dataclass(frozen=True)
class Round:
    """What one round showed. `accepted` are rows of the tree from 1 on."""

    budget: int
    nodes: int
    accepted: list[int]
    draft_s: float
    verify_s: float


class BudgetController:
    """Learns from the rounds of one route and says how large the next draft may be."""

    def __init__(self, most: int = LADDER[-1]) -> None:
        """`most`: nodes that the route's peers take at a time."""
        self._ladder = [k for k in LADDER if k <= most]
        self._budget = max(k for k in self._ladder if k <= FIRST)
        self._draft, self._verify = Line(doubling=8), Line(doubling=64)
        self._plain = Line(doubling=64, keep=KEEP_RARE)
        self._curve = AcceptanceCurve()
        self._patience = PATIENCE_FIRST
        self._since_other = 0
        self._rounds = 0

    @property
    def budget(self) -> int:
        """K of the next round; now and then it tries a neighbour, or the side that seemed to lose."""
        if self._since_other >= self._patience:
            return 0 if self._budget else max(self._ladder[1:], key=self.tokens_per_s, default=0)
        if self._budget and self._rounds % NEIGHBOUR == NEIGHBOUR - 1:
            return self._rung(1 if self._rounds // NEIGHBOUR % 2 else -1)
        return self._budget

    def tokens_per_s(self, budget: int) -> float:
        """What rounds of this budget are believed to bring."""
        plain_s = (self._plain if self._plain.known else self._verify).seconds(0)
        nodes, share = self._curve.nodes(budget)
        if not budget or not share:
            return 1 / plain_s if plain_s else 0.0
        verify_s = self._verify.seconds(nodes / share) if self._verify.known else plain_s
        round_s = self._draft.seconds(budget) + share * verify_s + (1 - share) * plain_s
        return self._curve.tokens(budget) / round_s if round_s else 0.0

    def observe(self, done: Round) -> None:
        if done.nodes:
            self._verify.observe(done.nodes, done.verify_s)
        else:
            self._plain.observe(0, done.verify_s)
        if done.budget:
            self._draft.observe(done.budget, done.draft_s)
            self._curve.observe(done.budget, done.nodes, done.accepted)
        self._rounds += 1
        self._note_other(drafted=done.nodes > 0)
        best = max(self._ladder, key=self.tokens_per_s)
        if self.tokens_per_s(best) > GAIN * self.tokens_per_s(self._budget):
            self._move_towards(best)

    def _move_towards(self, best: int) -> None:
        """One rung at a time, or to plain steps at once: far from what was tried, a line says little."""
        if not best or not self._budget:
            self._patience, self._since_other = PATIENCE_AFTER_CHANGE, 0
            self._budget = best
        else:
            self._budget = self._rung(1 if best > self._budget else -1)

    def _rung(self, step: int) -> int:
        """The neighbour of the present budget on the drafting side of the ladder."""
        at = self._ladder.index(self._budget) + step
        return self._ladder[min(max(at, 1), len(self._ladder) - 1)]

    def _note_other(self, *, drafted: bool) -> None:
        if drafted == (self._budget > 0):
            self._since_other += 1
        else:
            self._since_other = 0
            self._patience = min(2 * self._patience, PATIENCE_DRAFTING if self._budget else PATIENCE_PLAIN)
