"""The data stream to the next peer of a route."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

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
        self._replay: Iterator[pb.LinkFrame] = iter(())
        self._wake = asyncio.Event()
        self._credit = self._queued = 0
        self._call: grpc.aio.StreamStreamCall | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def send(self, frame: pb.LinkFrame) -> int:
        """Queue a frame; returns the bytes that wait."""
        self._frames.append(frame)
        self._queued += frame.ByteSize()
        self._wake.set()
        return self._queued

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
        self._tasks = [
            asyncio.create_task(self._read(peer_id, call)),
            asyncio.create_task(self._write(call)),
        ]

    def restart(self, replay: Iterator[pb.LinkFrame]) -> None:
        """Drop the link and what waits for it. The next one begins with `replay`, which is asked as credit allows."""
        self.close()
        self._frames.clear()
        self._queued = 0
        self._replay = replay

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._call:
            self._call.cancel()
            self._call = None

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                frame = next(self._replay, None) or await self._waiting()
                while self._credit < frame.ByteSize():
                    await self._woken()
                self._credit -= frame.ByteSize()
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader reports the fault

    async def _waiting(self) -> pb.LinkFrame:
        while not self._frames:
            await self._woken()
        frame = self._frames.popleft()
        self._queued -= frame.ByteSize()
        return frame

    async def _woken(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    async def _read(self, peer_id: str, call: grpc.aio.StreamStreamCall) -> None:
        reason = "it closed the link"
        try:
            while isinstance(reply := await call.read(), pb.LinkReply):
                self._credit += reply.credit.bytes
                self._wake.set()
        except grpc.aio.AioRpcError as error:
            reason = await _reason(call, error)
        self._on_fault(peer_id, reason)


async def _reason(call: grpc.aio.StreamStreamCall, error: BaseException) -> str:
    """What the next peer said when it ended the link: a failed write itself does not tell."""
    if isinstance(error, asyncio.TimeoutError):
        return "it did not answer in time"
    return await call.details() or (await call.code()).name
