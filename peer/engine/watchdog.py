"""Whether the compute thread gets on. The event loop lives and answers pings whatever has become of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from threading import Thread

from ...kernels.slow_work import is_declared

# How long one command or one iteration may take, beside the time that its rows take.
STALL_S = 30.0
CHECK_S = 2.0


class Watchdog:
    """Asks the thread for a sign of life, through `call`, as a step would be; calls `fell` with a sentence, once, where
    it died or gave none for `limit_s`."""

    def __init__(
        self, thread: Thread, call: Callable[[Callable[[], None]], None], limit_s: float, fell: Callable[[str], None]
    ) -> None:
        self._thread = thread
        self._call = call
        self._limit_s = limit_s
        self._fell = fell
        self._answered = True
        self._asked_at = 0.0

    async def run(self) -> None:
        while not (reason := self.check(time.monotonic())):  # noqa: ASYNC110 (the thread must not pay for it)
            await asyncio.sleep(CHECK_S)
        self._fell(reason)

    def check(self, now: float) -> str:
        """What is wrong at `now`, in seconds; empty where nothing is."""
        if not self._thread.is_alive():
            return "its compute thread died"
        if self._answered:
            self._answered, self._asked_at = False, now
            self._call(self._answer)
        elif is_declared():
            self._asked_at = now
        elif now - self._asked_at > self._limit_s:
            return f"its compute has hung for {now - self._asked_at:.0f} s"
        return ""

    def _answer(self) -> None:
        self._answered = True
