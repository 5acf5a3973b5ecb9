"""Plain TCP servers for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PlainServer:
    """`callers` are all connections that it ever accepted."""

    address: str = ""
    callers: list[asyncio.StreamWriter] = field(default_factory=list)


@asynccontextmanager
async def serving(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[PlainServer]:
    """A server that does so with each connection and then closes it. Afterwards none is open."""
    plain = PlainServer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        plain.callers.append(writer)
        with suppress(ConnectionError, asyncio.CancelledError):
            await handle(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)
    plain.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield plain
    finally:
        server.close()
        for writer in plain.callers:
            writer.transport.abort()
        for writer in plain.callers:
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass


def silent_server() -> Any:
    """A server that accepts, and says nothing."""
    return serving(_say_nothing)
