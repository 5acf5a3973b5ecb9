"""Memory that strangers' bursts took goes back to the system: an allocator, and gRPC's, would keep it."""

from __future__ import annotations

import asyncio
import time

import psutil

from ..model.heap import trim

LOOK_EVERY_S = 2.0
# What stays may still be in use: it is looked at again after twice the time, but no later than this.
LATEST_S = 60.0
# Less would cost more to return than it is worth.
WORTH_BYTES = 64 << 20


class TrimPlan:
    """When to return freed memory: once a process has grown, and again and again until it is as small as before."""

    def __init__(self) -> None:
        self._lowest = self._settled = 0
        self._wait_s = LOOK_EVERY_S
        self._next_at = 0.0

    def is_due(self, resident: int, now: float) -> bool:
        """Whether to trim at a size of so many bytes."""
        self._lowest = min(self._lowest or resident, resident)
        if resident <= self._lowest + WORTH_BYTES:
            return False
        if resident > self._settled + WORTH_BYTES:
            self._wait_s, self._next_at = LOOK_EVERY_S, now
        return now >= self._next_at

    def trimmed(self, resident: int, now: float) -> None:
        """What is left afterwards."""
        self._settled, self._next_at = resident, now + self._wait_s
        self._wait_s = min(2 * self._wait_s, LATEST_S)


async def give_back() -> None:
    """Return freed memory of this process for as long as it runs."""
    process, plan = psutil.Process(), TrimPlan()
    while True:
        if plan.is_due(process.memory_info().rss, time.monotonic()):
            await asyncio.to_thread(trim)
            plan.trimmed(process.memory_info().rss, time.monotonic())
        await asyncio.sleep(LOOK_EVERY_S)
