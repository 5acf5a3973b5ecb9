"""What peers hear when a session's route changes: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol import petal_pb2 as pb


@dataclass(frozen=True)
class ResumePoint:
    """Where a session stands: behind `step`, with these tokens cached; `commit` are that step's accepted rows.

    `extent`: length of the sequence that the rows were computed for.
    """

    step: int
    ids: Sequence[int]
    commit: Sequence[int]
    extent: int = 0


def resume_messages(up_to_date: Sequence[bool], epoch: int, point: ResumePoint) -> list[pb.Resume]:
    """One for each peer of the new route, of which each holds every row or is not `up_to_date`.

    They say where the session stands, who gets a replay, and who sends one.
    """
    following = [*up_to_date[1:], True]
    return [
        pb.Resume(
            route_epoch=epoch,
            step=point.step,
            length=len(point.ids),
            commit=point.commit,
            replayed=not here,
            replay=not after,
            extent=point.extent,
        )
        for here, after in zip(up_to_date, following, strict=True)
    ]


def replay_steps(point: ResumePoint, epoch: int, rows: int) -> list[pb.Step]:
    """The tokens again, in chunks of `rows`, for a first stage that lacks them."""
    return [
        pb.Step(
            step=point.step,
            route_epoch=epoch,
            base=start,
            ids=point.ids[start : start + rows],
            prefill=True,
            replay=True,
            extent=point.extent,
        )
        for start in range(0, len(point.ids), rows)
    ]
