"""Which steps a session takes, and which replayed rows."""

from __future__ import annotations

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
