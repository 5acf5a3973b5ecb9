"""One peer of a pipeline: the stream to it, what it said of itself, and how it fares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.petal_pb2_grpc import PeerStub
from ..routing.route import Stop
from .peer_error import PeerError, place_of


class Hop:
    """A stop of a route in use. `up_to_date`: the peer holds every row; `failed`: why it is of no use any more."""

    def __init__(
        self, stop: Stop, channel: grpc.aio.Channel, deliver: Callable[[Hop, pb.PeerFrame | PeerError], None]
    ) -> None:
        """`deliver` gets results, faults, a notice that the peer will leave and, as the last of all, an error."""
        self.stop = stop
        self.up_to_date = False
        self.draining = False
        self.failed: PeerError | None = None
        self.max_rows = self.max_nodes = 0
        self.features: frozenset[str] = frozenset()
        self.rope_borders: frozenset[int] = frozenset()
        # What the peer before this one shows to be let in.
        self.link_token = b""
        # What it was told of the newest route.
        self.told: pb.Resume | None = None
        self._deliver = deliver
        self._call = PeerStub(channel).Session()
        self._reader: asyncio.Task[None] | None = None
        self._reply: asyncio.Future[pb.PeerFrame] | None = None
        # Bytes of steps that the peer takes now; the event is set where there are more than before.
        self._window = 0.0
        self._granted = asyncio.Event()

    async def open(self, message: pb.Open, timeout: float) -> pb.Opened:
        """Reserve the session on this peer. Raises PeerError."""
        try:
            opened = await self._opened(message, timeout)
        except PeerError as error:
            raise self.fail(error) from None
        self.link_token, self.max_rows, self.features = opened.link_token, opened.max_rows, frozenset(opened.features)
        self.max_nodes = opened.max_nodes if opened.HasField("max_nodes") else opened.max_rows - 1
        self.rope_borders = frozenset(opened.rope_borders)
        self._window = opened.window_bytes
        self._reader = asyncio.create_task(self._read())
        return opened

    async def _opened(self, message: pb.Open, timeout: float) -> pb.Opened:
        try:
            await asyncio.wait_for(self._call.write(pb.ClientFrame(open=message)), timeout)
            reply = await asyncio.wait_for(self._call.read(), timeout)
        except asyncio.TimeoutError:
            raise self._error(grpc.StatusCode.UNAVAILABLE, "did not answer in time") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._why_ended() from None
        if not isinstance(reply, pb.PeerFrame) or not reply.HasField("opened"):
            raise await self._why_ended()
        return reply.opened

    async def send(self, frame: pb.ClientFrame) -> None:
        """Write a frame, waiting for credit where it is a step. Raises PeerError."""
        if frame.HasField("step"):
            size = frame.ByteSize()
            while self._window < size:
                self._granted.clear()
                await self._granted.wait()
            self._window -= size
        try:
            await self._call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise self.fail(await self._why_ended()) from None

    async def ask(self, frame: pb.ClientFrame, blamed: Hop, timeout: float) -> pb.PeerFrame:
        """Send a frame that the peer answers; `blamed` is who failed where no answer comes. Raises PeerError."""
        self._reply = reply = asyncio.get_running_loop().create_future()
        try:
            await self.send(frame)
            return await asyncio.wait_for(reply, timeout)
        except asyncio.TimeoutError:
            raise blamed.fail_with(grpc.StatusCode.UNAVAILABLE, "did not answer in time") from None
        finally:
            self._reply = None
            if not (reply.cancel() or reply.cancelled()):
                reply.exception()  # where the sending failed it is known already, and asyncio shall not complain

    def fail(self, error: PeerError) -> PeerError:
        """Of no use from now on; whoever waits for its reply hears why."""
        self.failed = self.failed or error
        self.refuse(error)
        return error

    def fail_with(self, code: grpc.StatusCode, reason: str) -> PeerError:
        """See `fail`; in a sentence that names the peer."""
        return self.fail(self._error(code, reason))

    def refuse(self, error: PeerError) -> None:
        """Whoever waits for a reply of this peer waits in vain."""
        if self._reply and not self._reply.done():
            self._reply.set_exception(error)

    def close(self) -> None:
        """End the session on this peer."""
        if self._reader:
            self._reader.cancel()
        self._call.cancel()

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                assert isinstance(frame, pb.PeerFrame)
                self._receive(frame)
        except grpc.aio.AioRpcError:
            pass
        self._deliver(self, self.fail(await self._why_ended()))
        # Who waits for credit on a stream that ended shall fail, not wait for ever.
        self._grant(float("inf"))

    def _receive(self, frame: pb.PeerFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "credit":
            self._grant(frame.credit.bytes)
        elif kind in ("result", "fault", "draining"):
            self._deliver(self, frame)
        elif self._reply and not self._reply.done():
            self._reply.set_result(frame)

    def _grant(self, size: float) -> None:
        self._window += size
        self._granted.set()

    def _error(self, code: grpc.StatusCode, reason: str) -> PeerError:
        peer = self.stop.peer
        return PeerError(self.stop.name, code, reason, peer.peer_id, place_of(peer))

    async def _why_ended(self) -> PeerError:
        code = await self._call.code()
        if code == grpc.StatusCode.OK:
            return self._error(grpc.StatusCode.UNAVAILABLE, "closed the session")
        return self._error(code, await self._call.details() or code.name)
