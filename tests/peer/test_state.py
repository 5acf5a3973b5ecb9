"""Which steps a session takes, and which replayed rows."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from petal.peer.engine.step import Step
from petal.peer.session.spec import SessionFailed, SessionSpec
from petal.peer.session.state import SequenceState
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.step import StepHeader, header_of

SPEC = SessionSpec(b"s" * 16, b"c" * 16, pb.FLOAT32, 64, 512, 16, 100, range(2), 4, "peer")


def header(step: int, base: int, rows: int = 1, **fields: Any) -> StepHeader:
    return header_of(pb.Step(step=step, base=base, ids=[1] * rows, **fields), rows)


def replay(step: int, base: int, rows: int) -> StepHeader:
    return header(step, base, rows, prefill=True, replay=True)


@pytest.fixture
def state() -> SequenceState:
    """Behind a prefill of eight rows and a tree of three."""
    fresh = SequenceState(SPEC)
    for step in (header(1, 0, 8, prefill=True), header(2, 8, 3)):
        record = fresh.accept(Step(step))
        assert record is not None
        record.finished = True
    return fresh


def test_steps_follow_each_other(state: SequenceState) -> None:
    assert state.accept(Step(header(3, 10, commit=[0, 1]))) is not None
    assert (state.step, state.length) == (3, 10)


def test_after_a_resumption_the_next_step_commits_nothing(state: SequenceState) -> None:
    state.resume(1, 8, missing=0)
    with pytest.raises(SessionFailed, match="left nothing to commit"):
        state.accept(Step(header(2, 9, commit=[0])))
    assert state.accept(Step(header(2, 8))) is not None


def test_a_step_before_the_resumption_is_stale(state: SequenceState) -> None:
    state.resume(2, 9, missing=0)
    with pytest.raises(SessionFailed, match="step 2 is stale; step 3 comes next"):
        state.accept(Step(header(2, 8, 3)))


def test_a_replay_brings_the_missing_rows_in_order(state: SequenceState) -> None:
    state.resume(2, 9, missing=9)
    with pytest.raises(SessionFailed, match="rows 0 to 8 behind step 2 are missing"):
        state.replay(replay(2, 4, 5))
    with pytest.raises(SessionFailed, match="rows 0 to 8 behind step 2 are missing"):
        state.replay(replay(1, 0, 5))
    state.replay(replay(2, 0, 4))
    with pytest.raises(SessionFailed, match="before the 5 rows that are still to be replayed"):
        state.accept(Step(header(3, 9)))
    with pytest.raises(SessionFailed, match="rows 4 to 8 behind step 2 are missing"):
        state.replay(replay(2, 4, 6))
    state.replay(replay(2, 4, 5))
    with pytest.raises(SessionFailed, match="no row is missing"):
        state.replay(replay(2, 9, 1))
    assert state.accept(Step(header(3, 9))) is not None


def test_nothing_forks_in_the_middle_of_a_replay(state: SequenceState) -> None:
    state.resume(2, 9, missing=9)
    with pytest.raises(SessionFailed, match="forks only between two steps"):
        SequenceState(SPEC).adopt(state)


def rows_of(state: SequenceState) -> int:
    """The most rows that the compute thread holds of a session: committed and pending ones."""
    newest = state.newest
    return state.length - state.missing + (newest.header.rows if newest and not newest.header.prefill else 0)


def test_whichever_way_rows_come_none_is_past_the_reservation(state: SequenceState) -> None:
    """Random words of a hostile client, each of which may be refused; the reservation is all that the pool lends."""
    random, state, refused = Random(0), SequenceState(SPEC), 0
    most = 0
    for _ in range(20_000):
        rows, base = random.randint(1, 40), random.choice([state.length, state.length - state.missing])
        commit = sorted(random.sample(range(4), random.randint(0, 2)))
        try:
            match random.choice(["prefill", "tree", "resume", "replay", "fork", "rewind"]):
                case "prefill":
                    state.accept(Step(header(state.step + 1, base, rows, prefill=True, commit=commit)))
                case "tree":
                    state.accept(Step(header(state.step + 1, base + len(commit), rows, commit=commit)))
                case "rewind":
                    state.accept(Step(header(state.step + 1, rows, 1, commit=commit, rewind=rows)))
                case "resume":
                    message = pb.Resume(step=state.step, length=random.randint(0, SPEC.reserve_tokens + 9))
                    state.check_resume(message)
                    state.resume(message.step, message.length, missing=message.length)
                case "replay":
                    state.replay(replay(state.step, base, rows))
                case "fork":
                    child = SequenceState(SPEC)
                    child.adopt(state)
                    state = child
        except SessionFailed:
            refused += 1
        if state.newest:
            state.newest.finished = True
        most = max(most, rows_of(state))
    assert SPEC.reserve_tokens - 4 <= most <= SPEC.reserve_tokens
    assert 0 < refused < 20_000


def test_a_fork_needs_room_for_what_it_takes_over(state: SequenceState) -> None:
    small = replace(SPEC, reserve_tokens=10)
    with pytest.raises(SessionFailed, match="11 rows exceed the 10"):
        SequenceState(small).adopt(state)
