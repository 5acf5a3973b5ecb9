"""Rates of calls and budgets of connections: who is refused, who is hung up on, who goes so that others find room."""

from __future__ import annotations

from petal.peer.limits.connection_budget import Connection, connection_budget, to_close
from petal.peer.limits.rates import Buckets, CallLimiter, CallRates, Rate, Verdict, address_of

ONE, TWO = "ipv4:10.0.0.1:1000", "ipv4:10.0.0.2:1000"
RATES = CallRates(connection=Rate(10, 20), address=Rate(10, 30), few=2, patience=5)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def calls(limiter: CallLimiter, connection: str, count: int) -> list[Verdict]:
    return [limiter.call(connection) for _ in range(count)]


def test_a_bucket_fills_again() -> None:
    clock = Clock()
    buckets: Buckets[str] = Buckets(Rate(2, 3), clock)
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    clock.now = 1.0
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    clock.now = 100.0
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False], "no more than its burst"


def test_a_connection_has_its_burst_then_its_rate_then_it_is_hung_up_on_once() -> None:
    clock = Clock()
    limiter = CallLimiter(RATES, clock)
    said = calls(limiter, ONE, 40)
    assert said[:20] == [Verdict.ADMITTED] * 20
    assert said.count(Verdict.HANG_UP) == 1
    assert said[20:].index(Verdict.HANG_UP) == 5, "after so many refusals"
    assert limiter.call(TWO) is Verdict.ADMITTED, "somebody else"
    patient = CallLimiter(RATES, clock)
    calls(patient, ONE, 20)
    clock.now = 0.5
    assert calls(patient, ONE, 6) == [Verdict.ADMITTED] * 5 + [Verdict.REFUSED]


def test_who_comes_back_on_new_connections_finds_its_burst_used_but_may_still_ask_a_little() -> None:
    limiter = CallLimiter(RATES, Clock())
    admitted = [calls(limiter, f"ipv4:10.0.0.1:{port}", 25).count(Verdict.ADMITTED) for port in range(4)]
    assert admitted == [20, 10, 2, 2]
    assert calls(limiter, TWO, 25).count(Verdict.ADMITTED) == 20, "another address has its own"


def test_an_address_is_a_host_and_in_ipv6_a_network() -> None:
    assert address_of(ONE) == "10.0.0.1"
    assert address_of("ipv6:%5B2001:db8::1%5D:80") == address_of("ipv6:[2001:db8::ffff]:81") == "2001:db8::/64"
    assert address_of("ipv6:[2001:db8:0:1::1]:80") != address_of("ipv6:[2001:db8::1]:80")
    assert address_of("unix:socket") == ""


def test_nobody_goes_while_there_is_room() -> None:
    assert to_close([Connection(f"ipv4:10.0.0.{n}:1", False, n) for n in range(15)], 20) == []


def test_idle_ones_of_crowded_addresses_go_first_the_oldest_of_them_and_never_one_that_serves() -> None:
    crowd = [Connection(f"ipv4:10.0.0.1:{n}", n == 0, 100.0 - n) for n in range(14)]
    others = [Connection(f"ipv4:10.0.1.{n}:1", False, 500.0) for n in range(4)]
    assert to_close([*others, *crowd], 20) == [f"ipv4:10.0.0.1:{n}" for n in range(1, 9)]
    assert to_close([Connection(f"ipv4:10.0.0.1:{n}", True, 1.0) for n in range(20)], 20) == []


def test_a_budget_leaves_files_for_all_else() -> None:
    few, many = connection_budget(10**7), connection_budget(50)
    assert 0 < few < many
