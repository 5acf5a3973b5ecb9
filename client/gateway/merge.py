"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from .tasks import end

T = TypeVar("T")

# Items of streams that run ahead of whoever reads them.
_AHEAD = 8


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they come. The first error ends all; so does whoever stops reading."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield item
        return
    items: asyncio.Queue[T] = asyncio.Queue(_AHEAD)
    tasks = [asyncio.create_task(_feed(stream, items)) for stream in streams]
    everything = asyncio.gather(*tasks)
    getting: asyncio.Future[T] | None = None
    try:
        while not (everything.done() and items.empty()):
            getting = asyncio.ensure_future(items.get())
            waited: list[asyncio.Future[Any]] = [getting, everything]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
            else:
                getting.cancel()
            if everything.done() and everything.exception():
                break
        await everything
    finally:
        await asyncio.gather(*map(end, tasks))
        if getting:
            await end(getting)


async def _feed(stream: AsyncGenerator[T, None], items: asyncio.Queue[T]) -> None:
    async with aclosing(stream) as source:
        async for item in source:
            await items.put(item)
