"""What happens in a trial: a pure function of its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Trials with consecutive seeds go through all of them in turn.
FAULTS = ("kill", "stop", "reset", "cut", "slow", "two", "bootstrap", "restart", "drain")
# The peer, or its connections, are gone at once: a reset tells.
ABRUPT = frozenset({"kill", "reset", "two", "restart"})
# Nothing tells: only silence does.
SILENT = frozenset({"stop", "cut"})
DRAFTERS = ("none", "ngram", "random")
# So many tokens are still to come when the fault strikes.
REST = 16


@dataclass(frozen=True)
class Visit:
    """One client's generation: which case of the pool, and who drafts."""

    case: int
    drafter: str


@dataclass(frozen=True)
class Plan:
    """`at_token`: tokens that the first client has when the fault strikes, 0 being in its prefill, `delay_s` later.

    `places`: which stops of its route are hit, in the order in which they are.
    """

    seed: int
    fault: str
    at_token: int
    delay_s: float
    places: tuple[int, ...]
    visits: tuple[Visit, ...]


def plan(seed: int, tokens: int, cases: int, clients: int, stops: int) -> Plan:
    """The trial of `seed`."""
    rng = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    at_token = 0 if rng.random() < 0.15 else rng.randint(1, max(1, tokens - REST))
    return Plan(
        seed=seed,
        fault=fault,
        at_token=at_token,
        delay_s=rng.uniform(0, 0.06),
        places=tuple(rng.sample(range(stops), 2 if fault == "two" else 1)),
        visits=tuple(Visit(rng.randrange(cases), rng.choice(DRAFTERS)) for _ in range(clients)),
    )
