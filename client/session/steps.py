"""Steps on their way through a pipeline: each gets its answer, whoever of the peers fails meanwhile."""

from __future__ import annotations

import time

import grpc

from ...protocol import petal_pb2 as pb
from ..routing.route import Route
from .failover import RouteKeeper
from .options import SessionOptions
from .pace import StepPace
from .peer_error import PeerError
from .pipeline import AnswerLate, Pipeline
from .result import ResultError, ResultReader, StepResult
from .resume import ResumePoint
from .sequence import SequenceState


class StepStream:
    """Sends the steps of one sequence and returns their answers, in order."""

    def __init__(
        self, sequence: SequenceState, pipeline: Pipeline, keeper: RouteKeeper, options: SessionOptions
    ) -> None:
        self._sequence = sequence
        self._pipeline = pipeline
        self._keeper = keeper
        self._options = options
        self._pace = StepPace(options.step_timeout_s)
        # Without an answer yet, oldest first; a change of route sends them again.
        self._unanswered: dict[int, pb.Step] = {}

    async def open_fork(self, route: Route, parent: bytes) -> None:
        """Open as a fork of the session `parent`.

        Where a peer refuses that or is gone, others compute the rows anew; of one that has no room now the word stands.
        Raises PeerError, NoRoute.
        """
        self._keeper.waiting()
        try:
            await self._pipeline.open(route, fork_of=parent)
        except PeerError as error:
            if error.busy:
                raise
            await self._keeper.fail_over(error, self)

    async def hand_over(self) -> None:
        """Leave peers that are about to leave, before the next step is made. Raises PeerError."""
        if not self._unanswered:
            self._keeper.waiting()
        await self._keeper.hand_over(self)

    async def send(self, step: pb.Step) -> None:
        """Raises PeerError, NoRoute."""
        if not self._unanswered:
            self._keeper.waiting()
        self._unanswered[step.step] = step
        try:
            await self._transmit(step)
        except PeerError as error:
            await self._keeper.fail_over(error, self)

    async def result(self, number: int) -> StepResult:
        """The answer to the step of this number. Raises PeerError, NoRoute."""
        step, rows = self._unanswered[number], len(self._unanswered[number].ids)
        since, late = time.monotonic(), 0
        while True:
            last = self._pipeline.hops[-1]
            reader = ResultReader(step, self._options.codec, last.stop.peer)
            patience_s = self._pace.patience_s(rows + self._pipeline.replayed_rows) * 2**late
            try:
                while (result := reader.add(await self._pipeline.result(patience_s))) is None:
                    pass
            except ResultError as error:
                await self._keeper.fail_over(last.fail_with(grpc.StatusCode.DATA_LOSS, str(error)), self)
            except AnswerLate as error:
                late += 1
                await self._keeper.look_into(error, self)
            except PeerError as error:
                await self._keeper.fail_over(error, self)
            else:
                del self._unanswered[number]
                self._keeper.answered()
                self._pace.answered(rows, time.monotonic() - since)
                return result

    async def _transmit(self, step: pb.Step) -> None:
        """To the first stage, and to the last with what only that needs; where this machine embeds, no ids to any."""
        first, last = self._pipeline.hops[0], self._pipeline.hops[-1]
        step.route_epoch = self._pipeline.epoch
        sequence, ends = self._sequence, self._options.local_ends
        if first is not last or ends:
            to_first = sequence.to_first_stage(step)
            if ends:
                await ends.embed(to_first.step, self._options.codec)
            await first.send(to_first)
        if ends and first is not last:
            await last.send(sequence.to_silent_last_stage(step))
        elif not ends:
            await last.send(sequence.to_last_stage(step, last.up_to_date))

    # What the keeper of the route needs where peers change.

    def resume_point(self) -> ResumePoint:
        """Behind the last step that was answered."""
        sequence = self._sequence
        if not self._unanswered:
            return ResumePoint(sequence.step, sequence.ids, sequence.commit, sequence.extent)
        first = next(iter(self._unanswered.values()))
        return ResumePoint(first.step - 1, sequence.ids[: first.base], list(first.commit), sequence.extent)

    async def resend(self) -> None:
        """Send the steps without an answer along the new route. Raises PeerError."""
        # Commit and rewind are part of where the peers stand now.
        self._sequence.resumed()
        for step in self._unanswered.values():
            step.ClearField("commit")
            step.ClearField("rewind")
            await self._transmit(step)
