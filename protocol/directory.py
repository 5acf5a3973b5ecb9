"""The directory: who hosts what. Full peers read it from the DHT, light clients ask any peer over gRPC."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import grpc

from . import petal_pb2 as pb
from . import petal_pb2_grpc as rpc
from .records import CLOCK_SKEW_S, RecordError, fresher, verify_record

MAX_PEERS = 4096
MAX_REPLY_BYTES = 16 * 1024 * 1024
MAX_LEARNED = 8  # addresses of known peers to try after the given ones
Peers = list[pb.PeerRecord]  # inside the classes below, `list` is a method
SignedRecords = list[pb.SignedRecord]
Connect = Callable[[str], grpc.aio.Channel]


class DirectoryError(Exception):
    """Why the directory could not be read or written, in one sentence."""


class Directory(ABC):
    """Finds the peers of a swarm."""

    @abstractmethod
    async def list(self, model: str | None = None) -> Peers:
        """The verified, unexpired record of every peer that hosts blocks of `model` (None: of any model)."""

    @abstractmethod
    async def close(self) -> None:
        """Release what the directory holds."""


class RecordBook:
    """The freshest verified record of every peer. Tombstones stay until they expire, so that no replay undoes them."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[pb.PeerRecord, pb.SignedRecord]] = {}

    def add(self, signed: pb.SignedRecord, *, now: float | None = None) -> bool:
        """Take in a record; False if it is no news, RecordError if it is not to be believed."""
        record = verify_record(signed, now=now)
        if record.peer_id in self._entries:
            news = fresher(record, self._entries[record.peer_id][0])
        else:
            news = self._has_room(now)
        if not news:
            return False
        self._entries[record.peer_id] = record, signed
        return True

    def list(self, model: str | None = None, *, now: float | None = None) -> Peers:
        """Records of the peers that are there; copies, which the caller may change."""
        self.expire(now=now)
        there = [record for record, _ in self._entries.values() if record.state != pb.LEFT]
        return [pb.PeerRecord.FromString(r.SerializeToString()) for r in there if model in (None, r.model)]

    def signed(self, model: str | None = None) -> SignedRecords:
        """What to tell others: the signed records, tombstones included."""
        self.expire()
        return [signed for record, signed in self._entries.values() if model in (None, record.model)]

    def _has_room(self, now: float | None) -> bool:
        if len(self._entries) >= MAX_PEERS:
            self.expire(now=now)
        return len(self._entries) < MAX_PEERS

    def expire(self, *, now: float | None = None) -> None:
        """Forget the records whose time is over."""
        limit = (time.time() if now is None else now) - CLOCK_SKEW_S
        self._entries = {peer: entry for peer, entry in self._entries.items() if entry[0].expires_at > limit}


def connect_plain(address: str) -> grpc.aio.Channel:
    """A channel without TLS, as public swarms use; on a connection of its own, since an older one may be dead."""
    options = [("grpc.max_receive_message_length", MAX_REPLY_BYTES), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options=options)


class GrpcDirectory(Directory):
    """Asks the peers at `addresses`, and those it learned of, in turn; believes only what is signed.

    A peer that does not answer within `patience_s` holds up nobody: the next is asked, too.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        connect: Connect = connect_plain,
        timeout_s: float = 5.0,
        patience_s: float = 0.5,
    ) -> None:
        self._addresses = list(addresses)
        self._connect = connect
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._book = RecordBook()

    async def list(self, model: str | None = None) -> Peers:
        """See Directory; DirectoryError if no peer gives an answer to be believed."""
        failures: list[str] = []
        answered = False
        asking: dict[asyncio.Task[None], str] = {}
        candidates = iter(self._candidates())
        address = next(candidates, None)
        try:
            while address or asking:
                if address:
                    asking[asyncio.create_task(self._ask(address, model))] = address
                    address = next(candidates, None)
                patience = self._patience_s if address else None
                done, _ = await asyncio.wait(asking, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    asked = asking.pop(task)
                    try:
                        task.result()
                    except (grpc.RpcError, RecordError) as error:
                        failures.append(f"{asked}: {_reason(error)}")
                        continue
                    answered = True
                    self._prefer(asked)
                    if peers := self._book.list(model):
                        return peers
        finally:
            for task in asking:
                task.cancel()
        if not answered:
            raise DirectoryError(f"No peer answered ({'; '.join(failures)}): check the addresses and your network.")
        return []

    async def close(self) -> None:
        """See Directory; nothing is held between calls."""

    def _candidates(self) -> Sequence[str]:
        learned = [address for record in self._book.list() for address in record.addresses]
        return tuple(dict.fromkeys([*self._addresses, *learned[:MAX_LEARNED]]))

    def _prefer(self, address: str) -> None:
        self._addresses = [address, *(other for other in self._addresses if other != address)]

    async def _ask(self, address: str, model: str | None) -> None:
        async with self._connect(address) as channel:
            reply = await rpc.DirectoryStub(channel).List(pb.ListRequest(model=model or ""), timeout=self._timeout_s)
        refused: list[RecordError] = []
        for signed in reply.records[:MAX_PEERS]:
            try:
                self._book.add(signed)
            except RecordError as error:
                refused.append(error)
        if refused and len(refused) == len(reply.records):
            raise refused[0]


class DirectoryService(rpc.DirectoryServicer):
    """Serves a peer's view of the swarm over gRPC. The callables are asked at every call and answer at once."""

    def __init__(
        self,
        peer_id: str,
        *,
        state: Callable[[], pb.PeerState],
        records: Callable[[str | None], Iterable[pb.SignedRecord]],
        bootstrap: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._peer_id = peer_id
        self._state = state
        self._records = records
        self._bootstrap = bootstrap

    async def List(self, request: pb.ListRequest, context: grpc.aio.ServicerContext) -> pb.ListReply:
        """Every record that fits a message."""
        reply = pb.ListReply(bootstrap=self._bootstrap())
        room = MAX_REPLY_BYTES // 2
        for signed in self._records(request.model or None):
            room -= signed.ByteSize()
            if room < 0:
                break
            reply.records.append(signed)
        return reply

    async def Ping(self, request: pb.PingRequest, context: grpc.aio.ServicerContext) -> pb.PingReply:
        """Who is here, and in which state."""
        return pb.PingReply(peer_id=self._peer_id, state=self._state())


class Pong(NamedTuple):
    """A peer's answer to a ping; it is not signed."""

    peer_id: str
    state: pb.PeerState
    rtt_s: float


async def ping(address: str, *, timeout: float = 2.0, connect: Connect = connect_plain) -> Pong | None:
    """Ask a peer whether it is there and time the round trip, connecting not counted; None if it does not answer."""
    async with connect(address) as channel:
        stub = rpc.DirectoryStub(channel)
        try:
            await asyncio.wait_for(channel.channel_ready(), timeout)
            sent = time.perf_counter()
            reply = await stub.Ping(pb.PingRequest(), timeout=timeout)
        except (grpc.RpcError, asyncio.TimeoutError):
            return None
        return Pong(reply.peer_id, reply.state, time.perf_counter() - sent)


async def ping_all(
    addresses: Iterable[str], *, timeout: float = 2.0, connect: Connect = connect_plain
) -> dict[str, Pong | None]:
    """Ping many peers at once."""
    addresses = list(dict.fromkeys(addresses))
    pongs = await asyncio.gather(*(ping(address, timeout=timeout, connect=connect) for address in addresses))
    return dict(zip(addresses, pongs, strict=True))


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error).rstrip(".")
