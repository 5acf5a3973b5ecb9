"""The door and the pace: who waits, who is told to come again, and that nobody's place is lost."""

from __future__ import annotations

import asyncio
import time

import pytest
from petal.client.gateway.door import Door
from petal.client.gateway.errors import ApiError
from petal.client.gateway.pace import Pace


async def test_the_higher_priority_goes_first_then_who_came_first() -> None:
    door, order = Door(1, 10, 5), list[str]()

    async def pass_through(name: str, priority: int) -> None:
        async with door.passage(priority):
            order.append(name)
            await asyncio.sleep(0)

    async with door.passage():
        waiting = [asyncio.create_task(pass_through(*who)) for who in (("a", 0), ("b", 0), ("c", 5), ("d", -1))]
        await asyncio.sleep(0)
        assert door.waiting == 4
    await asyncio.gather(*waiting)
    assert order == ["c", "a", "b", "d"]


async def test_who_waits_too_long_or_comes_too_late() -> None:
    door = Door(1, 1, 0.05)
    async with door.passage():
        late = asyncio.create_task(door.passage().__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="wait already"):
            await door.passage().__aenter__()
        with pytest.raises(ApiError, match="no room"):
            await late
    async with door.passage():
        assert door.waiting == 0


async def test_who_leaves_the_line_takes_no_place_with_it() -> None:
    door = Door(2, 100, 5)

    async def pass_through(stay_s: float) -> None:
        async with door.passage():
            await asyncio.sleep(stay_s)

    tasks = [asyncio.create_task(pass_through(0.001 * (n % 3))) for n in range(60)]
    for n, task in enumerate(tasks):
        await asyncio.sleep(0.0005)
        if n % 2:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(asyncio.gather(*(pass_through(0) for _ in range(10))), 2)


async def test_a_burst_is_free_and_what_follows_is_paced() -> None:
    pace, began = Pace(per_s=50, burst=5), time.monotonic()
    await asyncio.gather(*(pace.turn() for _ in range(5)))
    assert time.monotonic() - began < 0.05
    await asyncio.gather(*(pace.turn() for _ in range(10)))
    assert time.monotonic() - began > 0.15
