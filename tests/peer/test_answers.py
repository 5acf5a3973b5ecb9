"""What nobody reads: who has to go so that all answers fit, and when freed memory goes back."""

from __future__ import annotations

from petal.peer.limits.answers import STALLED_S, Owed, in_the_way
from petal.peer.limits.memory import LATEST_S, LOOK_EVERY_S, WORTH_BYTES, TrimPlan

READS, STALLS = 0.0, STALLED_S + 1


def test_nobody_ends_while_all_answers_fit() -> None:
    owed = {b"a": Owed(50, STALLS), b"b": Owed(50, STALLS)}
    assert in_the_way(owed, b"a", 100) == []


def test_who_stalls_with_most_ends_first_and_no_more_than_need_be() -> None:
    owed = {b"a": Owed(40, STALLS), b"b": Owed(60, STALLS), b"c": Owed(70, READS), b"d": Owed(10, READS)}
    assert in_the_way(owed, b"d", 150) == [b"b"]
    assert in_the_way(owed, b"d", 100) == [b"b", b"a"]


def test_where_everybody_reads_who_asks_is_refused() -> None:
    owed = {b"a": Owed(90, READS), b"b": Owed(20, READS)}
    assert in_the_way(owed, b"b", 100) == [b"b"]
    stalling = {**owed, b"c": Owed(1, STALLS)}
    assert in_the_way(stalling, b"b", 100) == [b"c", b"b"], "what stalls is not enough"
    assert in_the_way({b"a": Owed(101, STALLS)}, b"a", 100) == [b"a"], "once"


def test_memory_goes_back_after_growth_until_it_is_as_before() -> None:
    plan, more = TrimPlan(), WORTH_BYTES + 1
    assert not plan.is_due(1000, now=0)
    assert not plan.is_due(1000 + WORTH_BYTES, now=2), "not worth it"
    assert plan.is_due(1000 + more, now=4)
    plan.trimmed(1000 + more, now=4)
    assert not plan.is_due(1000 + more, now=4 + LOOK_EVERY_S / 2), "it may be in use"
    assert plan.is_due(1000 + more, now=4 + LOOK_EVERY_S)
    plan.trimmed(1100, now=4 + LOOK_EVERY_S)
    assert not plan.is_due(1100, now=1000), "as small as before"


def test_what_stays_in_use_is_looked_at_ever_more_rarely_unless_there_is_more_of_it() -> None:
    plan, size, trims, now = TrimPlan(), 10 * WORTH_BYTES, [], 0.0
    plan.is_due(1000, now)
    while now < 600:
        if plan.is_due(size, now):
            plan.trimmed(size, now)
            trims.append(now)
        now += LOOK_EVERY_S
    assert 600 / LATEST_S <= len(trims) < 20
    assert plan.is_due(size + 2 * WORTH_BYTES, now), "it has grown"
