"""The client's stream to one peer of its route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.petal_pb2_grpc import PeerStub

_OUR_FAULT = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED}
)


class PeerError(RuntimeError):
    """A peer refused or failed; the message is one sentence that names it."""

    def __init__(self, peer: str, code: grpc.StatusCode, reason: str, peer_id: str = "") -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.code = code
        self.peer_id = peer_id

    @property
    def busy(self) -> bool:
        return self.code == grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def gone(self) -> bool:
        return self.code == grpc.StatusCode.UNAVAILABLE

    @property
    def replaceable(self) -> bool:
        """Whether another peer may do what this one could not: the session itself is not at fault."""
        return bool(self.peer_id) and self.code not in _OUR_FAULT


class PeerStream:
    """Frames to and from one peer. What arrives goes to `deliver`, an error too, as the last of all."""

    def __init__(
        self,
        name: str,
        peer_id: str,
        channel: grpc.aio.Channel,
        deliver: Callable[[PeerStream, pb.PeerFrame | PeerError], None],
    ) -> None:
        self.name = name
        self.peer_id = peer_id
        self._deliver = deliver
        self._call = PeerStub(channel).Session()
        self._reader: asyncio.Task[None] | None = None
        self._credit = asyncio.Condition()
        self._window = 0.0

    async def open(self, message: pb.Open, timeout: float) -> pb.Opened:
        """Reserve the session on this peer. Raises PeerError."""
        try:
            await asyncio.wait_for(self._call.write(pb.ClientFrame(open=message)), timeout)
            reply = await asyncio.wait_for(self._call.read(), timeout)
        except asyncio.TimeoutError:
            raise self.error(grpc.StatusCode.UNAVAILABLE, "did not answer in time") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._error() from None
        if not isinstance(reply, pb.PeerFrame) or not reply.HasField("opened"):
            raise await self._error()
        self._window = reply.opened.window_bytes
        self._reader = asyncio.create_task(self._read())
        return reply.opened

    async def send(self, frame: pb.ClientFrame) -> None:
        """Write a frame, waiting for credit where it is a step."""
        size = frame.ByteSize() if frame.HasField("step") else 0
        async with self._credit:
            await self._credit.wait_for(lambda: self._window >= size)
            self._window -= size
        try:
            await self._call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._error() from None

    async def _grant(self, size: float) -> None:
        async with self._credit:
            self._window += size
            self._credit.notify_all()

    def close(self) -> None:
        if self._reader:
            self._reader.cancel()
        self._call.cancel()

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                assert isinstance(frame, pb.PeerFrame)
                if frame.HasField("credit"):
                    await self._grant(frame.credit.bytes)
                else:
                    self._deliver(self, frame)
        except grpc.aio.AioRpcError:
            pass
        self._deliver(self, await self._error())
        # Who waits for credit on a stream that ended shall fail, not wait for ever.
        await self._grant(float("inf"))

    def error(self, code: grpc.StatusCode, reason: str) -> PeerError:
        return PeerError(self.name, code, reason, self.peer_id)

    async def _error(self) -> PeerError:
        """Why the stream ended."""
        code = await self._call.code()
        if code == grpc.StatusCode.OK:
            return self.error(grpc.StatusCode.UNAVAILABLE, "closed the session")
        return self.error(code, await self._call.details() or code.name)
