"""The door: so many requests run at a time, so many wait, and whoever comes then is told to come again."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import too_many


class Door:
    """Lets in who waits by priority, the highest first, then by arrival."""

    def __init__(self, running: int, waiting: int, patience_s: float) -> None:
        """`patience_s`: for how long somebody may wait."""
        self._free = running
        self._most_waiting = waiting
        self._patience_s = patience_s
        self._line: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        return sum(not place.done() for _, _, place in self._line)

    @asynccontextmanager
    async def passage(self, priority: int = 0) -> AsyncIterator[None]:
        """Raises ApiError where too many wait, or the wait was too long."""
        await self._enter(priority)
        try:
            yield
        finally:
            self._free += 1
            self._let_in()

    async def _enter(self, priority: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if self.waiting >= self._most_waiting:
            raise too_many(f"{self._most_waiting} requests wait already", self._patience_s / 4)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line, (-priority, next(self._numbers), place))
        try:
            await asyncio.wait_for(asyncio.shield(place), self._patience_s)
        except BaseException as error:
            if not place.cancel():  # let in at the very moment of leaving
                self._free += 1
                self._let_in()
            if isinstance(error, asyncio.TimeoutError):
                raise too_many(f"no room came free in {self._patience_s:g} s", self._patience_s / 4) from None
            raise

    def _let_in(self) -> None:
        while self._free > 0 and self._line:
            place = heapq.heappop(self._line)[2]
            if not place.done():
                self._free -= 1
                place.set_result(None)
