"""The gRPC side of a stream: frames in, frames out, and how it ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import SILENT_S, UNREAD_S
from ..session.spec import SessionFailed, invalid

Frame = TypeVar("Frame")


class Writer:
    """Frames for one stream: `put` never waits; a slow reader holds up only its own stream."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._frames: deque[pb.PeerFrame | pb.LinkReply] = deque()
        self._wake = asyncio.Event()
        # Bytes that wait.
        self.queued = 0
        self._writing_since = math.inf

    @property
    def stalled_s(self) -> float:
        """Seconds for which the other end has read nothing of what waits."""
        return max(0.0, time.monotonic() - self._writing_since)

    def put(self, frame: pb.PeerFrame | pb.LinkReply) -> int:
        """Queue a frame; returns the bytes that wait."""
        self._frames.append(frame)
        self.queued += frame.ByteSize()
        self._wake.set()
        return self.queued

    def close(self) -> None:
        """Nobody reads any more: what waits is let go at once, not when garbage is collected."""
        self._frames.clear()
        self.queued = 0

    async def run(self) -> None:
        while True:
            while self._frames:
                frame = self._frames.popleft()
                self._writing_since = time.monotonic()
                await self._context.write(frame)
                self._writing_since = math.inf
                self.queued -= frame.ByteSize()
            self._wake.clear()
            await self._wake.wait()

    async def watch(self) -> None:
        """Raises SessionFailed once the other end has not read for too long."""
        while self.stalled_s < UNREAD_S:  # noqa: ASYNC110 (a frame must not pay for a timer)
            await asyncio.sleep(UNREAD_S / 4)
        raise SessionFailed(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing was read for {UNREAD_S:g} s")


async def start_answering(context: grpc.aio.ServicerContext) -> None:
    """Send the headers, which a first frame would take along: cut short in that, no stream can be ended any more."""
    await context.send_initial_metadata(())


async def first_of(requests: AsyncIterator[Frame]) -> Frame | None:
    """The frame that a stream starts with; None where it ends at once. Raises SessionFailed where none comes."""
    try:
        return await asyncio.wait_for(anext(requests, None), SILENT_S)
    except asyncio.TimeoutError:
        raise SessionFailed(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came within {SILENT_S:g} s") from None
    except DecodeError as error:
        raise unreadable() from error


def unreadable() -> SessionFailed:
    return invalid("what arrived is not a message of this protocol")


async def run_until_one_ends(
    *work: Coroutine[Any, Any, None], failed: asyncio.Future[SessionFailed] | None = None
) -> SessionFailed | None:
    """Run a stream's parts until one of them ends, or its session has `failed`; the others are cancelled.

    Why it ended: None where the client closed the stream or its connection broke.
    """
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        watched: list[asyncio.Future[Any]] = [failed, *tasks] if failed else [*tasks]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        return failed.result() if failed and failed.done() else _failure_of(tasks)
    finally:
        for task in tasks:
            task.cancel()


def _failure_of(tasks: Iterable[asyncio.Future[None]]) -> SessionFailed | None:
    for task in (task for task in tasks if task.done()):
        error = task.exception()
        if isinstance(error, SessionFailed):
            return error
        if error and not isinstance(error, (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError)):
            raise error
    return None


async def abort(context: grpc.aio.ServicerContext, failure: SessionFailed) -> None:
    await context.abort(failure.code, str(failure))
