"""What every API's reply is: whole or a stream of frames, sent for as long as somebody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...protocol.errors import PetalError
from .events import Answer, Event
from .tasks import end

# A client that takes nothing for so long is gone.
UNREAD_S = 30.0
# Proxies close connections on which nothing happens.
PING_S = 15.0
LINES = "application/x-ndjson"
T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """One message of a stream: JSON or plain text, of a named event where the API names them."""

    data: Any
    event: str | None = None


class Reply(Protocol):
    """An API's shape for one request's answer, which fills while events come."""

    answer: Answer

    def whole(self) -> dict[str, Any]: ...
    def frames(self, event: Event) -> Iterator[Frame]: ...
    def end(self) -> Iterator[Frame]: ...


class ClientGone(PetalError):
    """Nobody waits for the answer any more."""


def to_json(value: Any) -> str:
    """Short, in UTF-8, and never a number that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def server_sent(frame: Frame) -> bytes:
    """As an event of text/event-stream."""
    data = frame.data if isinstance(frame.data, str) else to_json(frame.data)
    name = f"event: {frame.event}\n" if frame.event else ""
    return f"{name}data: {data}\n\n".encode()


def line(frame: Frame) -> bytes:
    """As one of LINES."""
    return f"{to_json(frame.data)}\n".encode()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; it is cancelled where the client hangs up first. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await end(task)
        await end(gone)


class StreamedResponse(Response):
    """Sends `pieces` as they come, a `ping` where none comes for long; ends where nobody reads."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], media_type: str, ping: bytes = b"") -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(asyncio.TimeoutError):  # nobody reads: the connection ends unfinished
                    sending.result()
        finally:
            await end(sending)
            await end(gone)
            await self._pieces.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._with_pings()) as pieces:
            async for piece in pieces:
                message = {"type": "http.response.body", "body": piece, "more_body": True}
                await asyncio.wait_for(send(message), UNREAD_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_pings(self) -> AsyncGenerator[bytes, None]:
        source: AsyncIterator[bytes] = aiter(self._pieces)
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(source))
                done, _ = await asyncio.wait([coming], timeout=PING_S if self._ping else None)
                if not done:
                    yield self._ping
                    continue
                try:
                    piece = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield piece
        finally:
            if coming:
                await end(coming)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
