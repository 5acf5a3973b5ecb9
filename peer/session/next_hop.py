"""The data stream to the next peer of a route."""

from __future__ import annotations

import asyncio
import math
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.petal_pb2_grpc import PeerStub

CONNECT_TIMEOUT_S = 5.0


class LinkFailed(ConnectionError):
    """The next peer did not take the link."""


class NextHop:
    """Sends activations in order as far as the next peer's credit goes; `send` never waits."""

    def __init__(self, on_fault: Callable[[str, str], None]) -> None:
        self._on_fault = on_fault
        self._frames: deque[pb.LinkFrame] = deque()
        # Frames that go before all others, and the first of them.
        self._replay: Iterator[pb.LinkFrame] = iter(())
        self._replayed: pb.LinkFrame | None = None
        self._credit = 0
        # Bytes that wait, and since when none of them was taken, where several do.
        self.queued = 0
        self._waiting_since = math.inf
        self._call: grpc.aio.StreamStreamCall | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    @property
    def stalled_s(self) -> float:
        """Seconds for which the next peer has taken nothing of what waits."""
        return max(0.0, time.monotonic() - self._waiting_since)

    def send(self, frame: pb.LinkFrame) -> int:
        """Queue a frame; returns the bytes that wait."""
        if self._frames and self._waiting_since == math.inf:
            self._waiting_since = time.monotonic()
        self._frames.append(frame)
        self.queued += frame.ByteSize()
        self._write_on()
        return self.queued

    async def attach(self, peer_id: str, channel: grpc.aio.Channel, hello: pb.LinkHello) -> None:
        """Open the stream and show the token; frames that wait are sent. Raises LinkFailed."""
        self.close()
        call = PeerStub(channel).Link()
        reply = None
        try:
            await asyncio.wait_for(call.write(pb.LinkFrame(hello=hello)), CONNECT_TIMEOUT_S)
            reply = await asyncio.wait_for(call.read(), CONNECT_TIMEOUT_S)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.TimeoutError) as error:
            raise LinkFailed(await _reason(call, error)) from error
        finally:
            if reply is None:  # also where the session ended meanwhile
                call.cancel()
        if not isinstance(reply, pb.LinkReply) or not reply.HasField("linked"):
            raise LinkFailed("it ended the link without a word")
        self._call = call
        self._credit = reply.linked.window_bytes
        self._reader = asyncio.create_task(self._read(peer_id, call))
        self._write_on()

    def restart(self, replay: Iterator[pb.LinkFrame]) -> None:
        """Drop the link and what waits for it. The next one begins with `replay`, which is asked as credit allows."""
        self.close()
        self._frames.clear()
        self.queued, self._waiting_since = 0, math.inf
        self._replay, self._replayed = replay, next(replay, None)

    def close(self) -> None:
        for task in (self._reader, self._writer):
            if task:
                task.cancel()
        self._reader = self._writer = None
        if self._call:
            self._call.cancel()
            self._call = None

    def _write_on(self) -> None:
        """Write what waits, unless a task is at it: what credit allows is on its way before this returns."""
        if self._call and (self._writer is None or self._writer.done()):
            self._writer = begun(self._write(self._call))

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while frame := self._take():
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._call = None  # the reader reports the fault

    def _take(self) -> pb.LinkFrame | None:
        """The next frame, if there is one and its credit."""
        frame = self._replayed or (self._frames[0] if self._frames else None)
        if frame is None or (size := frame.ByteSize()) > self._credit:
            return None
        self._credit -= size
        if self._replayed:
            self._replayed = next(self._replay, None)
        else:
            self._frames.popleft()
            self.queued -= size
            self._waiting_since = time.monotonic() if self._frames else math.inf
        return frame

    async def _read(self, peer_id: str, call: grpc.aio.StreamStreamCall) -> None:
        reason = "it closed the link"
        try:
            while isinstance(reply := await call.read(), pb.LinkReply):
                self._credit += reply.credit.bytes
                self._write_on()
        except grpc.aio.AioRpcError as error:
            reason = await _reason(call, error)
        self._on_fault(peer_id, reason)


async def _reason(call: grpc.aio.StreamStreamCall, error: BaseException) -> str:
    """What the next peer said when it ended the link: a failed write itself does not tell."""
    if isinstance(error, asyncio.TimeoutError):
        return "it did not answer in time"
    return await call.details() or (await call.code()).name


def begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine at once, up to where it waits; a task does the rest. From 3.12 on Python has eager tasks."""
    try:
        awaited = work.send(None)
    except StopIteration:
        return None
    return asyncio.create_task(_rest(work, awaited))


async def _rest(work: Coroutine[Any, Any, None], awaited: object) -> None:
    await _resumed(work, awaited)


@types.coroutine
def _resumed(work: Coroutine[Any, Any, None], awaited: object) -> Generator[Any, Any, None]:
    yield awaited
    yield from work.__await__()
