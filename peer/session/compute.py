"""One session's steps on the compute thread, seen from the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import grpc

from ..engine.engine import Engine
from ..engine.step import BadStep, DeadlinePassed, Step, StepFailed, StepOutput
from .spec import SessionFailed

_STATUS = {
    BadStep: grpc.StatusCode.INVALID_ARGUMENT,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class SessionCompute:
    """Steps in, outputs back on the event loop. `key` is the engine's name of the session; `fail` ends it."""

    def __init__(self, engine: Engine, key: bytes, fail: Callable[[SessionFailed], None]) -> None:
        self.last_used = time.monotonic()
        self._engine = engine
        self._key = key
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._running = self._resuming = 0
        self._closed = False

    @property
    def idle_s(self) -> float:
        """Seconds since anything happened."""
        return 0.0 if self._running else time.monotonic() - self.last_used

    @property
    def resuming(self) -> bool:
        """Whether the compute thread has yet to go back."""
        return self._resuming > 0

    def run(self, step: Step, finished: Callable[[StepOutput], None]) -> None:
        """`finished` hears of the output, unless a resumption undid the step."""

        def done(result: StepOutput | StepFailed) -> None:
            self._loop.call_soon_threadsafe(self._hand_over, result, finished)

        self._running += 1
        self._engine.submit(self._key, step, done)

    def resume(self, length: int, commit: Sequence[int], resumed: Callable[[], None]) -> None:
        """Go back; see `Engine.resume`. Of several resumptions on their way only the last one's `resumed` is called."""

        def done(refusal: str) -> None:
            self._loop.call_soon_threadsafe(self._resumed, refusal, resumed)

        self._resuming += 1
        self._engine.resume(self._key, length, commit, done)

    def close(self) -> None:
        """What is still under way comes to nothing."""
        self._closed = True
        self._engine.close(self._key)

    def _hand_over(self, result: StepOutput | StepFailed, finished: Callable[[StepOutput], None]) -> None:
        if self._resuming or self._closed:
            return
        self._running -= 1
        self.last_used = time.monotonic()
        if isinstance(result, StepFailed):
            self._fail(SessionFailed(_STATUS.get(type(result), grpc.StatusCode.INTERNAL), str(result)))
        else:
            finished(result)

    def _resumed(self, refusal: str, resumed: Callable[[], None]) -> None:
        """Nothing of later steps comes from the compute thread any more."""
        if self._resuming > 1:
            self._resuming -= 1  # the client went on to another route meanwhile
            return
        if refusal:
            self._fail(SessionFailed(grpc.StatusCode.ABORTED, refusal))
            return
        self._resuming = self._running = 0
        resumed()
