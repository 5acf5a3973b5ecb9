"""One endpoint that generates: its API's way to read requests, write replies and tell errors; and how it runs them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...protocol.errors import PetalError
from .access import caller_of
from .answers import answer
from .body import read_body
from .catalog import Catalog
from .door import Door
from .errors import ApiError, api_error
from .events import Begin, Event, Tokens
from .generation_request import GenerationRequest
from .keys import Caller
from .reply import Frame, Reply, StreamedResponse, server_sent, while_connected
from .served_model import ServedModel


@dataclass(frozen=True)
class Asked:
    """A request that was read: what to generate, if anything, and the reply to be."""

    model: str
    request: GenerationRequest | None
    reply: Reply
    streams: bool


@dataclass(frozen=True)
class Api:
    """`read` makes of a body what is asked by the owner of a key, `error` the API's error object, `encode` the bytes of
    a stream's frame."""

    read: Callable[[bytes, str], Asked]
    error: Callable[[ApiError], Mapping[str, Any]]
    encode: Callable[[Frame], bytes] = server_sent
    media_type: str = "text/event-stream"
    ping: bytes = b": ping\n\n"


class Endpoint:
    """Runs the requests of one API."""

    def __init__(self, api: Api, catalog: Catalog, door: Door) -> None:
        self._api = api
        self._catalog = catalog
        self._door = door

    async def respond(self, request: Request) -> Response:
        """Raises ApiError, PetalError, ClientGone: before anything is sent."""
        caller = caller_of(request)
        asked = self._api.read(await read_body(request), caller.owner)
        served = self._catalog.find(asked.model)
        caller.admit()
        events = self._events(served, asked, caller)
        if not asked.streams:
            return JSONResponse(await while_connected(request, _whole(events, asked.reply)))
        # What fails before the first event still has a status of its own.
        first = await while_connected(request, _first(events))
        return StreamedResponse(self._pieces(first, events, asked.reply), self._api.media_type, self._api.ping)

    async def _events(self, served: ServedModel, asked: Asked, caller: Caller) -> AsyncGenerator[Event, None]:
        if asked.request is None:
            return
        answered = asked.reply.answer
        served.sessions  # noqa: B018 (a model that cannot be served is told of at once)
        async with self._door.passage(caller.record.priority):
            try:
                async with aclosing(answer(served, asked.request, caller.owner)) as events:
                    async for event in events:
                        answered.add(event)
                        yield event
            finally:
                caller.tokens.spend(answered.tokens)

    async def _pieces(
        self, first: list[Event], events: AsyncGenerator[Event, None], reply: Reply
    ) -> AsyncGenerator[bytes, None]:
        """The stream's bytes; an error in its midst is its last frame."""
        encode = self._api.encode
        try:
            async with aclosing(events):
                for event in first:
                    for frame in reply.frames(event):
                        yield encode(frame)
                async for event in events:
                    for frame in reply.frames(event):
                        yield encode(frame)
                for frame in reply.end():
                    yield encode(frame)
        except PetalError as error:
            yield encode(Frame(self._api.error(api_error(error)), "error"))


async def _whole(events: AsyncGenerator[Event, None], reply: Reply) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            deque(reply.frames(event), maxlen=0)  # which fills the reply
    return reply.whole()


async def _first(events: AsyncGenerator[Event, None]) -> list[Event]:
    """Up to the first that says something."""
    found: list[Event] = []
    try:
        async for event in events:
            found.append(event)
            if not isinstance(event, (Begin, Tokens)):
                return found
    except BaseException:
        await events.aclose()
        raise
    return found
