"""A client by hand: raw frames on raw streams, for what the real client would never send."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from petal.peer.server import PeerServer
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.records import verify_record
from petal.protocol.petal_pb2_grpc import DirectoryStub, PeerStub
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import DIRECTORY_OPTIONS

# Who calls unless a test says otherwise.
CALLER = PublicTrust()
CLIENT = CALLER.client_id
ANSWER_S = 20.0


class RawStream:
    """One stream to a peer, with frames of one kind out and one kind in."""

    def __init__(self, call: grpc.aio.StreamStreamCall, frame: type) -> None:
        self.call = call
        self._frame = frame

    async def send(self, **kind: Any) -> None:
        await self.call.write(self._frame(**kind))

    async def read(self) -> Any:
        """The next frame; AioRpcError where the peer ended the stream."""
        frame = await asyncio.wait_for(self.call.read(), ANSWER_S)
        if frame is grpc.aio.EOF:
            raise EOFError("the peer ended the stream without an error")
        return frame

    async def refused(self, code: grpc.StatusCode, *words: str) -> str:
        """The stream ends with this status and one sentence that holds these words."""
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            await self._read_all()
        details = await self.call.details()
        assert await self.call.code() == code, details
        assert details
        assert "\n" not in details
        for word in words:
            assert word in details, details
        return details

    async def _read_all(self) -> None:
        while True:
            await self.read()

    def close(self) -> None:
        self.call.cancel()


class RawSession(RawStream):
    """A session stream; `result` gathers the parts of one answer."""

    async def open(self, **fields: Any) -> pb.Opened:
        await self.send(open=pb.Open(**fields))
        return (await self.read()).opened

    async def step(self, step: int, ids: Sequence[int] = (), **fields: Any) -> None:
        fields.setdefault("route_epoch", 1)
        await self.send(step=pb.Step(step=step, ids=ids, **fields))

    async def raise_epoch(self, epoch: int) -> None:
        """Change the route to a peer that nobody knows: the new epoch is all that comes of it."""
        await self.send(link_to=pb.LinkTo(peer_id="nobody", route_epoch=epoch))
        fault = (await self.read()).fault
        assert (fault.peer_id, fault.route_epoch) == ("nobody", epoch)

    async def result(self) -> pb.Result:
        whole = pb.Result()
        while not whole.last_part:
            frame = await self.read()
            assert frame.HasField("result"), frame
            part = frame.result
            whole.MergeFrom(
                pb.Result(**{f.name: v for f, v in part.ListFields() if f.name not in ("logits", "hidden")})
            )
            whole.logits += part.logits
            whole.hidden += part.hidden
        return whole


@dataclass
class ListedPeer:
    """A peer of another process, as the directory knows it."""

    address: str
    listed: pb.PeerRecord

    @classmethod
    async def at(cls, address: str) -> ListedPeer:
        async with CALLER.dial(address, DIRECTORY_OPTIONS) as channel:
            reply = await DirectoryStub(channel).List(pb.ListRequest(), timeout=ANSWER_S)
        records = map(verify_record, reply.records)
        return cls(address, next(record for record in records if address in record.addresses))

    def record(self) -> pb.PeerRecord:
        return self.listed


class Wire:
    """A channel of its own to one peer."""

    def __init__(self, peer: PeerServer | ListedPeer, options: Sequence[tuple[str, Any]] = ()) -> None:
        self.peer = peer
        self.record = peer.record()
        self.channel = CALLER.channel(self.record, peer.address, [("grpc.use_local_subchannel_pool", 1), *options])
        self._stub = PeerStub(self.channel)
        self._streams: list[RawStream] = []

    async def __aenter__(self) -> Wire:
        return self

    def close_streams(self) -> None:
        for stream in self._streams:
            stream.close()

    def forget(self, stream: RawStream) -> None:
        """A stream that the test has closed itself."""
        self._streams.remove(stream)

    async def __aexit__(self, *_: object) -> None:
        self.close_streams()
        await self.channel.close()

    def opening(self, caller: PublicTrust = CALLER, **changed: Any) -> dict[str, Any]:
        """Fields of a good open frame, but for what is changed."""
        good = {
            "session_id": secrets.token_bytes(16),
            "client_id": caller.client_id,
            "protocol": 1,
            "model_digest": self.record.model_digest,
            "start": self.record.start,
            "end": self.record.end,
            "reserve_tokens": 128,
            "codec": pb.FLOAT32,
            "route_epoch": 1,
        }
        fields = {**good, **changed}
        return {"hello": caller.hello(self.record, fields["session_id"]), **fields}

    def link_hello(self, session_id: bytes, token: bytes, route_epoch: int) -> pb.LinkHello:
        """What a link starts with."""
        hello = CALLER.hello(self.record, session_id)
        return pb.LinkHello(session_id=session_id, token=token, route_epoch=route_epoch, hello=hello)

    def stream(self) -> RawSession:
        stream = RawSession(self._stub.Session(), pb.ClientFrame)
        self._streams.append(stream)
        return stream

    async def session(self, **changed: Any) -> tuple[RawSession, pb.Opened]:
        stream = self.stream()
        return stream, await stream.open(**self.opening(**changed))

    def link(self) -> RawStream:
        stream = RawStream(self._stub.Link(), pb.LinkFrame)
        self._streams.append(stream)
        return stream

    async def prefilled(self, ids: Sequence[int], **changed: Any) -> tuple[RawSession, int]:
        """A session whose first step, a prefill, is done; and the token behind it."""
        session, _ = await self.session(**changed)
        await session.step(1, ids, prefill=True, sample=True)
        return session, (await session.result()).next_token


async def settled(peer: PeerServer) -> None:
    """Wait until the peer's compute thread has done what it was told so far."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    peer.engine.call(lambda: loop.call_soon_threadsafe(done.set))
    await asyncio.wait_for(done.wait(), ANSWER_S)


async def released(peer: PeerServer) -> None:
    """Wait until the peer's last session has ended; then every page must be free again."""
    for _ in range(1000):
        if not peer.admission.sessions:
            break
        await asyncio.sleep(0.005)
    await settled(peer)
    assert peer.admission.sessions == 0
    assert peer.engine.cache.free_pages == peer.engine.cache.n_pages
