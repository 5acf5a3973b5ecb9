from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from petal.peer.engine.batching_window import BatchingWindow
from petal.peer.engine.fair_queue import Tenant
from petal.peer.engine.scheduler import Budget, Ready, Scheduler

BUDGET = Budget(rows=64, rows_beside_decode=8, context_scale=100, decode_memory_s=1.0)
# One row costs one, whatever its context: then shares can be counted in rows.
EVEN = Budget(rows=100, rows_beside_decode=10, context_scale=10**30)


# The highest priority that the wire can carry.
TOP = 2**31 - 1


def tenant(client: bytes, weight: float = 1.0, granted: int = 0) -> Tenant:
    """A client that shares its turn with nobody."""
    return Tenant(client.decode(), client.decode(), weight, granted)


def decode(key, client=b"a", rows=1, context=0, **more):
    return Ready(key, tenant(client), rows, context, **more)


def prefill(key, client=b"a", rows=1000, context=0, granted=0, **more):
    return Ready(key, tenant(client, granted=granted), rows, context, prefill=True, **more)


class SchedulerMachine(RuleBasedStateMachine):
    """The model: what is ready and how far it ran, and which rows ran at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[int] = Scheduler(BUDGET)
        self.ready: dict[int, Ready[int]] = {}
        self.ran: dict[int, int] = {}
        self.now = 0.0
        self.last_decode = float("-inf")

    @rule(
        client=st.sampled_from([b"a", b"b", b"c"]),
        rows=st.one_of(st.integers(1, 10), st.integers(1, 300)),
        context=st.integers(0, 500),
        is_prefill=st.booleans(),
        priority=st.integers(-1, 2),
        patience=st.one_of(st.none(), st.floats(0, 5)),
    )
    def add(self, client, rows, context, is_prefill, priority, patience):
        key = len(self.ran)
        deadline = None if patience is None else self.now + patience
        granted = {b"a": 0, b"b": 1, b"c": 2}[client]
        step = Ready(key, tenant(client, granted=granted), rows, context, is_prefill, priority, deadline)
        self.ready[key], self.ran[key] = replace(step), 0
        self.scheduler.add(step)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.ready)
    @rule(choice=st.integers(0, 100))
    def cancel(self, choice):
        key = list(self.ready)[choice % len(self.ready)]
        self.scheduler.cancel(key)
        self.scheduler.cancel(key)
        del self.ready[key]

    @rule()
    def expire(self):
        late = {step.key for step in self.scheduler.expired(self.now)}
        assert late == {
            key
            for key, step in self.ready.items()
            if step.deadline is not None and step.deadline < self.now and not self.ran[key]
        }
        for key in late:
            del self.ready[key]

    @rule()
    def take(self):
        chunks = self.scheduler.take(self.now)
        assert [piece.step.prefill for piece in chunks] == sorted(piece.step.prefill for piece in chunks)
        assert len({piece.step.key for piece in chunks}) == len(chunks)
        before = dict(self.ran)
        decodes = [piece for piece in chunks if not piece.step.prefill]
        prefills = [piece for piece in chunks if piece.step.prefill]
        for piece in chunks:
            step = self.ready[piece.step.key]
            assert piece.start == self.ran[step.key]
            assert piece.start < piece.stop <= step.rows
            assert piece.last == (piece.stop == step.rows)
            self.ran[step.key] = piece.stop
        self._check_budget(decodes, prefills)
        for kind, pieces in ((False, decodes), (True, prefills)):
            self._check_choice(kind, {piece.step.key for piece in pieces}, before)
        for piece in chunks:
            if piece.last:
                del self.ready[piece.step.key]

    def _check_budget(self, decodes, prefills):
        for piece in decodes:
            assert (piece.start, piece.stop) == (0, piece.step.rows), "a decode step runs whole"
        assert len(decodes) <= 1 or sum(self._cost(piece) for piece in decodes) <= BUDGET.rows
        if decodes:
            self.last_decode = self.now
        quick = self.now - self.last_decode < BUDGET.decode_memory_s
        allowed = BUDGET.rows_beside_decode if quick else BUDGET.rows
        lone_row = [piece.stop - piece.start for piece in prefills] == [1]
        assert lone_row or sum(self._cost(piece) for piece in prefills) <= allowed + 1e-6

    def _cost(self, piece):
        return BUDGET.cost(piece.stop - piece.start, piece.step.context + piece.start)

    def _check_choice(self, kind, chosen, before):
        of_kind = {key: step for key, step in self.ready.items() if step.prefill == kind}
        assert bool(of_kind) == bool(chosen), "each class goes on in every iteration"
        for key in of_kind.keys() - chosen:
            assert self.ran[key] == before[key]
            left = of_kind[key]
            assert left.precedence <= min(of_kind[other].precedence for other in chosen)
            peers = [of_kind[other] for other in chosen if of_kind[other].tenant == left.tenant]
            assert all(left.priority <= mine.priority for mine in peers), "a client's own order"

    @invariant()
    def both_agree_on_what_is_ready(self):
        assert len(self.scheduler) == len(self.ready)
        assert all(key in self.scheduler for key in self.ready)
        # Queues exist only where something waits, and nobody is remembered for nothing.
        queues, sole = self.scheduler._queues, self.scheduler._sole
        queued = [step for step in self.ready.values() if sole is None or step.key != sole.key]
        assert sole is None or not queued, "only who is alone stands in no queue"
        assert queues.keys() == {(step.precedence, step.prefill) for step in queued}
        for kind, queue in queues.items():
            clients = [s.tenant.client for s in queued if (s.precedence, s.prefill) == kind]
            assert queue.clients.waiting == {client: clients.count(client) for client in clients}
            assert queue.clients.served.keys() >= set(clients)

    def teardown(self):
        for _ in range(100_000):
            if not self.ready:
                break
            self.now += 10
            self.take()
        assert not len(self.scheduler)
        assert not self.scheduler._queues
        assert self.scheduler.take(self.now) == []


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


# Decode and prefill.


def test_a_decode_step_never_waits_for_a_whole_prompt():
    scheduler = Scheduler(Budget(rows=1024, rows_beside_decode=32, context_scale=3072))
    scheduler.add(prefill("prompt", rows=100_000))
    assert scheduler.take(0.0)[0].stop == 1024
    scheduler.add(decode("token", b"b"))
    first, second = scheduler.take(0.1)
    assert first.step.key == "token"
    assert (second.start, second.stop) == (1024, 1024 + 24)  # 32 rows, each of them over 1024 cached ones
    # Where somebody decodes, the next token is expected soon: prompts stay short-winded for a while.
    assert scheduler.take(0.5)[0].stop - 1048 < 32
    assert scheduler.take(1.2)[0].stop > 1500


def test_a_step_over_the_budget_runs_alone():
    scheduler = Scheduler(EVEN)
    for key in range(2):
        scheduler.add(decode(key, rows=500))
    scheduler.add(decode(2, b"b", rows=1))
    taken = [[piece.step.key for piece in scheduler.take(0.0)] for _ in range(3)]
    assert taken == [[0], [2], [1]] or taken == [[0], [2, 1], []]
    assert not len(scheduler)


def test_small_prompts_share_an_iteration():
    scheduler = Scheduler(EVEN)
    for key in range(5):
        scheduler.add(prefill(key, rows=30))
    assert [(p.step.key, p.start, p.stop) for p in scheduler.take(0.0)] == [
        (0, 0, 30),
        (1, 0, 30),
        (2, 0, 30),
        (3, 0, 10),
    ]


def test_long_contexts_cost_more():
    scheduler = Scheduler(replace(EVEN, context_scale=100))
    scheduler.add(prefill(0, context=300))
    assert scheduler.take(0.0)[0].stop == 25


def test_a_deadline_ends_only_what_has_not_begun():
    scheduler = Scheduler(EVEN)
    scheduler.add(prefill("begun", deadline=1.0))
    scheduler.take(0.0)
    scheduler.add(prefill("waiting", deadline=1.0))
    scheduler.add(prefill("patient", deadline=2.0))
    assert scheduler.expired(1.0) == []
    assert [step.key for step in scheduler.expired(1.5)] == ["waiting"]
    assert "begun" in scheduler
    assert "patient" in scheduler


# Priority.


def test_a_clients_priority_orders_its_own_steps():
    scheduler = Scheduler(EVEN)
    scheduler.add(prefill("low", rows=100))
    for i in range(5):
        scheduler.add(prefill(i, rows=100, priority=1))
    assert [scheduler.take(0.0)[0].step.key for _ in range(6)] == [0, 1, 2, 3, 4, "low"]


@pytest.mark.parametrize("make", [decode, prefill])
def test_a_priority_that_nobody_granted_takes_nothing_from_others(make):
    """Nor does it win where both were served alike: who came first goes first."""
    scheduler = Scheduler(EVEN)
    for turn in range(200):
        scheduler.add(make(("honest", turn), b"honest", rows=100))
        scheduler.add(make(("greedy", turn), b"greedy", rows=100, priority=TOP))
    order = [scheduler.take(0.0)[0].step.key[0] for _ in range(200)]
    assert order == ["honest", "greedy"] * 100


def test_a_priority_that_was_granted_counts_as_far_as_it_was():
    scheduler = Scheduler(EVEN)
    scheduler.add(prefill("other", b"a", rows=100))
    scheduler.add(prefill("higher", b"b", rows=100, priority=2, granted=2))
    scheduler.add(prefill("granted", b"c", rows=100, priority=TOP, granted=3))
    scheduler.add(prefill("modest", b"d", rows=100, priority=0, granted=3))
    assert [scheduler.take(0.0)[0].step.key for _ in range(4)] == ["granted", "higher", "other", "modest"]


# Fairness.


class Clients:
    """Clients that always have several prompts ready."""

    def __init__(self, sizes: dict[bytes, list[int]], budget: Budget = EVEN) -> None:
        self.scheduler: Scheduler[int] = Scheduler(budget)
        self.sizes = sizes
        self.served = dict.fromkeys(sizes, 0)
        self._keys = 0
        for client in sizes:
            self.start(client)

    def start(self, client: bytes) -> None:
        # One prompt may be nearly done; the others still hold an iteration's rows, so that none goes unused.
        for _ in range(2 + EVEN.rows // min(self.sizes[client])):
            self._next(client)

    def _next(self, client: bytes) -> None:
        sizes = self.sizes[client]
        self._keys += 1
        self.scheduler.add(prefill(self._keys, client, rows=sizes[self._keys % len(sizes)]))

    def run(self, iterations: int) -> None:
        for _ in range(iterations):
            for piece in self.scheduler.take(0.0):
                client = piece.step.tenant.client.encode()
                self.served[client] += piece.stop - piece.start
                if piece.last and client in self.sizes:
                    self._next(client)


SIZES = st.lists(st.integers(20, 1000), min_size=1, max_size=4)


@given(SIZES, SIZES, st.integers(1, 60))
def test_two_clients_get_equal_service_within_one_chunk(first, second, iterations):
    clients = Clients({b"a": first, b"b": second})
    clients.run(iterations)
    assert sum(clients.served.values()) == iterations * EVEN.rows
    assert abs(clients.served[b"a"] - clients.served[b"b"]) <= EVEN.rows


@settings(deadline=None)
@given(st.lists(SIZES, min_size=3, max_size=5), st.integers(0, 60), st.integers(1, 40))
def test_a_newcomer_neither_starves_nor_is_starved(sizes, before, after):
    *old, new = [bytes([65 + i]) for i in range(len(sizes))]
    clients = Clients(dict(zip(old, sizes, strict=False)))
    clients.run(before)
    clients.sizes[new], clients.served = sizes[-1], dict.fromkeys([*old, new], 0)
    clients.start(new)
    clients.run(after)
    fair = after * EVEN.rows / len(sizes)
    for served in clients.served.values():
        assert abs(served - fair) <= 2 * EVEN.rows


def test_whoever_comes_back_owes_nothing_for_the_past():
    """Also where nothing was ready for a moment in between, as between any two tokens."""
    scheduler = Scheduler(EVEN)
    for key in range(50):
        scheduler.add(prefill(key, b"old", rows=1000))
        while len(scheduler):
            scheduler.take(0.0)
    scheduler.add(prefill("new", b"new", rows=10**6))
    scheduler.add(prefill("old", b"old", rows=10**6))
    served = {"new": 0, "old": 0}
    for _ in range(20):
        for piece in scheduler.take(0.0):
            served[piece.step.key] += piece.stop - piece.start
    assert abs(served["new"] - served["old"]) <= EVEN.rows


def test_whoever_was_away_gains_nothing():
    clients = Clients({b"a": [50], b"b": [50]})
    clients.run(10)
    del clients.sizes[b"b"]  # b's prompts run out
    clients.run(500)
    clients.sizes[b"b"] = [50]
    clients.served = {b"a": 0, b"b": 0}
    clients.start(b"b")
    clients.run(20)
    assert abs(clients.served[b"a"] - clients.served[b"b"]) <= 2 * EVEN.rows


def test_endless_newcomers_do_not_starve_the_old():
    clients = Clients({b"old": [1000]})
    for i in range(300):
        clients.served[b"%d" % i] = 0
        clients.scheduler.add(prefill(-1 - i, b"%d" % i, rows=EVEN.rows))
        clients.run(1)
    fewest = 300 * EVEN.rows / len(clients.scheduler._queues[0, True].clients.waiting)
    assert clients.served[b"old"] >= 0.5 * fewest


def test_queues_of_clients_that_left_do_not_pile_up():
    scheduler = Scheduler(EVEN)
    scheduler.add(prefill("endless", b"endless", rows=10**9))
    most = 0
    for i in range(5000):
        scheduler.add(prefill(i, b"%d" % i, rows=40))
        scheduler.take(0.0)
        most = max(most, len(scheduler._queues[0, True].clients.served))
    assert most < 20


def test_what_decoding_cost_does_not_delay_a_prompt():
    scheduler = Scheduler(EVEN)
    for key in range(100):
        scheduler.add(decode(key, b"a", rows=32))
    scheduler.add(prefill("a", b"a"))
    scheduler.add(prefill("b", b"b"))
    served = {"a": 0, "b": 0}
    for _ in range(20):
        for piece in scheduler.take(0.0):
            if piece.step.prefill:
                served[piece.step.key] += piece.stop - piece.start
    assert served == {"a": 100, "b": 100}


class TestBatchingWindow:
    """Waiting for a batch's sessions pays while they come, and stops costing when they do not."""

    def test_waits_for_the_sessions_of_the_last_batch(self) -> None:
        window = BatchingWindow(patience=0.1)
        window.ran(0.0, 1.0, decodes=3)
        assert window.wait(1.0, 1) == pytest.approx(0.1)
        assert window.wait(1.05, 2) == pytest.approx(0.05)
        assert window.wait(1.06, 3) == 0
        assert window.wait(1.06, 0) == 0, "nobody is expected any more"

    def test_a_prefill_alone_lets_a_decode_come_back_first(self) -> None:
        window = BatchingWindow(patience=0.1)
        window.ran(0.0, 1.0, decodes=1)
        assert window.wait(1.0, 0) > 0

    def test_never_waits_without_decodes(self) -> None:
        window = BatchingWindow()
        window.ran(0.0, 1.0, decodes=0)
        assert window.wait(1.0, 0) == 0

    def test_patience_follows_what_waiting_brought(self) -> None:
        window = BatchingWindow(patience=0.1)
        for turn in range(20):
            window.ran(turn, turn + 1, decodes=2)
            assert window.wait(turn + 2, 1) == 0
        assert window.patience == window.least
        for turn in range(20):
            window.ran(turn, turn + 1, decodes=2)
            assert window.wait(turn + 1, 2) == 0
        assert window.patience == window.most


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_labs_share_by_weight_however_many_clients_they_have(weight, share):
    scheduler, rows = Scheduler(EVEN), {"small": 0, "large": 0}
    scheduler.add(Ready("s", Tenant("s", "small", weight), 10**6, 0, prefill=True))
    for i in range(20):
        scheduler.add(Ready(i, Tenant(str(i), "large"), 10**6, 0, prefill=True))
    for _ in range(400):
        for piece in scheduler.take(0.0):
            rows[piece.step.tenant.share] += piece.stop - piece.start
    assert abs(rows["small"] / sum(rows.values()) - share) < 0.02
