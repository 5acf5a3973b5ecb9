"""How often the gateway opens sessions: peers take a gateway for one client, and refuse whoever calls too often."""

from __future__ import annotations

import asyncio
import time

PER_S, BURST = 24.0, 96.0


class Pace:
    """Turns, so many a second, up to `burst` at once; whoever comes too early waits."""

    def __init__(self, per_s: float = PER_S, burst: float = BURST) -> None:
        self._per_s, self._burst = per_s, burst
        self._left = burst
        self._since = time.monotonic()

    async def turn(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._since) * self._per_s) - 1
        self._since = now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._per_s)
