"""The replay log against a plain list of rows, and the budget that all logs share."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given, settings
from petal.peer.session.outputs import replay_frames, whole_rows
from petal.peer.session.replay import ReplayBudget, ReplayLog

ROW = 4
_serial = itertools.count()


def rows(count: int) -> list[bytes]:
    """Rows that occur nowhere else."""
    return [next(_serial).to_bytes(ROW, "big") for _ in range(count)]


class Model:
    """What the log should hold: committed rows, and a tree that waits for its commit."""

    def __init__(self) -> None:
        self.log = ReplayLog(ROW, ReplayBudget(1 << 20))
        self.rows: list[bytes] = []
        self.tree: list[bytes] = []

    def prefill(self, count: int, accepted: int) -> None:
        self._settle(accepted)
        new = rows(count)
        self.log.append(b"".join(new))
        self.rows += new

    def step(self, count: int, accepted: int) -> None:
        self._settle(accepted)
        self.tree = rows(count)
        self.log.hold(b"".join(self.tree))

    def rewind(self, length: int, accepted: int) -> None:
        length %= len(self.rows) + 1
        self._settle(accepted, length)

    def undo(self, _: int, accepted: int) -> None:
        """The tree was never answered: its rows go."""
        self.log.resume(len(self.rows), ())
        self.tree = []

    def resume(self, _: int, accepted: int) -> None:
        """The tree was answered, and no later step came through."""
        commit = self._path(accepted)
        self.rows += [self.tree[row] for row in commit]
        self.tree = []
        self.log.resume(len(self.rows), commit)

    def fork(self, *_: int) -> None:
        self.log = self.log.fork()

    def _settle(self, accepted: int, rewind: int | None = None) -> None:
        commit = self._path(accepted)
        self.log.apply(commit, rewind)
        self.rows += [self.tree[row] for row in commit]
        self.tree = []
        if rewind is not None:
            del self.rows[rewind:]

    def _path(self, accepted: int) -> list[int]:
        return sorted({0, accepted % len(self.tree), (accepted * 7) % len(self.tree)}) if self.tree else []


OPERATION = st.tuples(
    st.sampled_from(["prefill", "step", "step", "rewind", "undo", "resume", "fork"]),
    st.integers(1, 9),
    st.integers(0, 100),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATION, max_size=30))
def test_the_log_holds_the_committed_rows(operations: list[tuple[str, int, int]]) -> None:
    model = Model()
    for name, count, accepted in operations:
        getattr(model, name)(count, accepted)
        assert b"".join(model.log.chunks) == b"".join(model.rows)
        assert model.log.rows == len(model.rows)
        assert not model.log.lost


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 200))
def test_frames_bring_every_row_once_and_whole(counts: list[int], most: int) -> None:
    chunks = [b"".join(rows(count)) for count in counts]
    parts = list(whole_rows(chunks, ROW, most))
    assert b"".join(parts) == b"".join(chunks)
    assert all(len(part) % ROW == 0 and len(part) <= max(ROW, most) for part in parts)
    base = 3
    for frame in replay_frames(9, 2, base, chunks, ROW):
        message = frame.activations
        assert (message.step, message.route_epoch, message.base, message.replay) == (9, 2, base, True)
        assert len(message.hidden) == message.total_bytes == message.rows * ROW
        base += message.rows
    assert base == 3 + sum(counts)


def test_a_log_that_lacks_rows_says_so() -> None:
    log = ReplayLog(ROW, ReplayBudget(1 << 20))
    log.append(b"".join(rows(3)))
    log.resume(5, ())
    assert log.lost
    log.append(b"".join(rows(3)))
    assert log.chunks == ()
    log.restart()
    log.append(b"".join(rows(5)))
    assert (log.lost, log.rows) == (False, 5)


def test_the_budget_takes_from_whoever_was_idle_for_longest() -> None:
    budget = ReplayBudget(10 * ROW)
    first, second, third = (ReplayLog(ROW, budget) for _ in range(3))
    first.append(b"".join(rows(4)))
    second.append(b"".join(rows(4)))
    first.hold(b"".join(rows(1)))
    assert budget.used == 9 * ROW
    third.append(b"".join(rows(3)))
    assert (first.lost, second.lost, third.lost) == (False, True, False)
    assert budget.used == 8 * ROW
    assert second.chunks == ()
    third.append(b"".join(rows(11)))
    assert third.lost, "a log larger than the cap is not kept either"
    assert budget.used == 0
    first.lose()
    second.lose()
    assert budget.used == 0


def test_a_replay_on_its_way_outlives_its_log() -> None:
    log = ReplayLog(ROW, ReplayBudget(1 << 20))
    said = rows(6)
    log.append(b"".join(said))
    frames = replay_frames(1, 1, 0, log.chunks, ROW)
    log.lose()
    assert b"".join(frame.activations.hidden for frame in frames) == b"".join(said)
