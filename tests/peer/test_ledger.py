"""Which steps a session takes, and which replayed rows."""

from __future__ import annotations

from typing import Any

import pytest
from petal.peer.session.spec import SessionFailed, SessionSpec
from petal.peer.session.state import Ledger
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.step import StepHeader, header_of

SPEC = SessionSpec(b"s" * 16, b"c" * 16, pb.FLOAT32, 64, 512, 16, 100, range(2), 4, "peer")


def header(step: int, base: int, rows: int = 1, **fields: Any) -> StepHeader:
    return header_of(pb.Step(step=step, base=base, ids=[1] * rows, **fields), rows)


def replay(step: int, base: int, rows: int) -> StepHeader:
    return header(step, base, rows, prefill=True, replay=True)


@pytest.fixture
def ledger() -> Ledger:
    """Behind a prefill of eight rows and a tree of three."""
    fresh = Ledger(SPEC)
    for step in (header(1, 0, 8, prefill=True), header(2, 8, 3)):
        entry = fresh.accept(step, ())
        assert entry is not None
        entry.finished = True
    return fresh


def test_steps_follow_each_other(ledger: Ledger) -> None:
    assert ledger.accept(header(3, 10, commit=[0, 1]), ()) is not None
    assert (ledger.step, ledger.length) == (3, 10)


def test_after_a_resumption_the_next_step_commits_nothing(ledger: Ledger) -> None:
    ledger.resume(1, 8, missing=0)
    with pytest.raises(SessionFailed, match="left nothing to commit"):
        ledger.accept(header(2, 9, commit=[0]), ())
    assert ledger.accept(header(2, 8), ()) is not None


def test_a_step_before_the_resumption_is_stale(ledger: Ledger) -> None:
    ledger.resume(2, 9, missing=0)
    with pytest.raises(SessionFailed, match="step 2 is stale; step 3 comes next"):
        ledger.accept(header(2, 8, 3), ())


def test_a_replay_brings_the_missing_rows_in_order(ledger: Ledger) -> None:
    ledger.resume(2, 9, missing=9)
    with pytest.raises(SessionFailed, match="rows 0 to 8 behind step 2 are missing"):
        ledger.replay(replay(2, 4, 5))
    with pytest.raises(SessionFailed, match="rows 0 to 8 behind step 2 are missing"):
        ledger.replay(replay(1, 0, 5))
    ledger.replay(replay(2, 0, 4))
    with pytest.raises(SessionFailed, match="before the 5 rows that are still to be replayed"):
        ledger.accept(header(3, 9), ())
    with pytest.raises(SessionFailed, match="rows 4 to 8 behind step 2 are missing"):
        ledger.replay(replay(2, 4, 6))
    ledger.replay(replay(2, 4, 5))
    with pytest.raises(SessionFailed, match="no row is missing"):
        ledger.replay(replay(2, 9, 1))
    assert ledger.accept(header(3, 9), ()) is not None


def test_nothing_forks_in_the_middle_of_a_replay(ledger: Ledger) -> None:
    ledger.resume(2, 9, missing=9)
    with pytest.raises(SessionFailed, match="forks only between two steps"):
        Ledger(SPEC).adopt(ledger)
