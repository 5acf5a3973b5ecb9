"""The directory: who hosts what. Full peers read it from the DHT, light clients ask any peer over gRPC."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple

import grpc

from .. import petal_pb2 as pb
from .. import petal_pb2_grpc as rpc
from ..errors import PetalError
from ..trust.trust import PublicTrust, Trust, TrustError
from ..wire.limits import DIRECTORY_OPTIONS
from .records import CLOCK_SKEW_S, RecordError, fresher, verify_record

MAX_PEERS = 4096
MAX_REPLY_BYTES = 16 * 1024 * 1024
MAX_LEARNED = 8  # addresses of known peers to try after the given ones
Peers = list[pb.PeerRecord]  # inside the classes below, `list` is a method
SignedRecords = list[pb.SignedRecord]
Connect = Callable[[], AbstractAsyncContextManager[grpc.aio.Channel]]


class DirectoryError(PetalError):
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
    """The freshest record of every peer that is believed. Tombstones stay until they expire: no replay undoes them."""

    def __init__(self, trust: Trust | None = None) -> None:
        self._trust = trust or PublicTrust()
        self._entries: dict[str, tuple[pb.PeerRecord, pb.SignedRecord]] = {}

    def add(self, signed: pb.SignedRecord, *, now: float | None = None) -> bool:
        """Take in a record; False if it is no news, RecordError if it is not to be believed."""
        record = verify_record(signed, now=now)
        self._believe(record)
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

    def _believe(self, record: pb.PeerRecord) -> None:
        try:
            self._trust.believe(record)
        except TrustError as error:
            raise RecordError(f"The record of {record.peer_id} is not to be believed: {error}.") from None

    def _has_room(self, now: float | None) -> bool:
        if len(self._entries) >= MAX_PEERS:
            self.expire(now=now)
        return len(self._entries) < MAX_PEERS

    def expire(self, *, now: float | None = None) -> None:
        """Forget the records whose time is over, and those of peers that are revoked by now."""
        limit = (time.time() if now is None else now) - CLOCK_SKEW_S
        entries = self._entries.items()
        self._entries = {
            peer: (record, signed)
            for peer, (record, signed) in entries
            if record.expires_at > limit and self._trust.trusted(record.certificates)
        }


class GrpcDirectory(Directory):
    """Asks the peers at `addresses`, and those it learned of, in turn; believes only what is signed.

    A peer that does not answer within `patience_s` holds up nobody: the next is asked, too.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        trust: Trust | None = None,
        timeout_s: float = 5.0,
        patience_s: float = 0.5,
    ) -> None:
        self._addresses = list(addresses)
        self._trust = trust or PublicTrust()
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._book = RecordBook(self._trust)

    async def list(self, model: str | None = None) -> Peers:
        """See Directory; DirectoryError if no peer gives an answer to be believed."""
        failures: list[str] = []
        refused = False
        answered = False
        asking: dict[asyncio.Task[None], str] = {}
        candidates = iter(self._candidates().items())
        candidate = next(candidates, None)
        try:
            while candidate or asking:
                if candidate:
                    address, connect = candidate
                    asking[asyncio.create_task(self._ask(connect, model))] = address
                    candidate = next(candidates, None)
                patience = self._patience_s if candidate else None
                done, _ = await asyncio.wait(asking, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    asked = asking.pop(task)
                    try:
                        task.result()
                    except (grpc.RpcError, OSError, RecordError) as error:
                        refused = refused or _refuses(error)
                        failures.append(f"{asked}: {_reason(error)}")
                        continue
                    answered = True
                    self._prefer(asked)
                    if peers := self._book.list(model):
                        return peers
        finally:
            for task in asking:
                task.cancel()
        if refused and not answered:
            raise DirectoryError(
                f"This machine's membership was revoked or has run out ({'; '.join(failures)}): ask an admin of the "
                "swarm for a new invitation."
            )
        if not answered:
            raise DirectoryError(f"No peer answered ({'; '.join(failures)}): check the addresses and your network.")
        return []

    async def close(self) -> None:
        """See Directory; nothing is held between calls."""

    def _candidates(self) -> dict[str, Connect]:
        """Ways to ask, by address; one that was given is dialed anew, whatever key it has by now."""
        learned = {
            address: partial(self._trust.channel, record, address, DIRECTORY_OPTIONS)
            for record in self._book.list()
            for address in record.addresses
        }
        given = {address: partial(self._trust.dial, address, DIRECTORY_OPTIONS) for address in self._addresses}
        return given | {address: learned[address] for address in [*learned][:MAX_LEARNED] if address not in given}

    def _prefer(self, address: str) -> None:
        self._addresses = [address, *(other for other in self._addresses if other != address)]

    async def _ask(self, connect: Connect, model: str | None) -> None:
        request = pb.ListRequest(model=model or "", revocations=self._trust.revocations)
        try:
            reply = await asyncio.wait_for(_list(connect, request), self._timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError("it did not answer in time") from None
        self._trust.learn(reply.revocations)
        refused: list[RecordError] = []
        for signed in reply.records[:MAX_PEERS]:
            try:
                self._book.add(signed)
            except RecordError as error:
                refused.append(error)
        if refused and len(refused) == len(reply.records):
            raise refused[0]


class DirectoryService(rpc.DirectoryServicer):
    """Serves a peer's view of the swarm over gRPC. The callables are asked at every call and answer at once.

    `heard` takes in what callers tell, which they do in private swarms only.
    """

    def __init__(
        self,
        peer_id: str,
        *,
        state: Callable[[], pb.PeerState],
        records: Callable[[str | None], Iterable[pb.SignedRecord]],
        bootstrap: Callable[[], Iterable[str]] = tuple,
        heard: Callable[[pb.ListRequest], None] = lambda request: None,
        revocations: Callable[[], Iterable[pb.RevocationList]] = tuple,
    ) -> None:
        self._peer_id = peer_id
        self._state = state
        self._records = records
        self._bootstrap = bootstrap
        self._heard = heard
        self._revocations = revocations

    async def List(self, request: pb.ListRequest, context: grpc.aio.ServicerContext) -> pb.ListReply:
        """Every record that fits a message."""
        self._heard(request)
        reply = pb.ListReply(bootstrap=self._bootstrap(), revocations=self._revocations())
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


async def ping(connect: Connect, *, timeout: float = 2.0) -> Pong | None:
    """Ask a peer whether it is there and time the round trip, connecting not counted; None if it does not answer."""
    try:
        async with connect() as channel:
            await asyncio.wait_for(channel.channel_ready(), timeout)
            sent = time.perf_counter()
            reply = await rpc.DirectoryStub(channel).Ping(pb.PingRequest(), timeout=timeout)
            return Pong(reply.peer_id, reply.state, time.perf_counter() - sent)
    except (grpc.RpcError, OSError, asyncio.TimeoutError):
        return None


async def ping_all(records: Iterable[pb.PeerRecord], trust: Trust, *, timeout: float = 2.0) -> dict[str, Pong | None]:
    """Ping the peers of verified records at once, each at its best address and by its own key; answers by peer id.

    Each ping has a connection of its own, since an older one may be dead.
    """
    ways = {r.peer_id: partial(trust.channel, r, r.addresses[0], DIRECTORY_OPTIONS) for r in records if r.addresses}
    pongs = await asyncio.gather(*(ping(connect, timeout=timeout) for connect in ways.values()))
    return dict(zip(ways, pongs, strict=True))


async def _list(connect: Connect, request: pb.ListRequest) -> pb.ListReply:
    async with connect() as channel:
        return await rpc.DirectoryStub(channel).List(request)


def _refuses(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAUTHENTICATED


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error).rstrip(".")
