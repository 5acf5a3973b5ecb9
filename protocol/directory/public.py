"""The directory of a public swarm: the DHT, and where it fails, the peers themselves.

Every peer remembers whom it has met. Where the DHT is out of reach, or does not know of somebody who was there, peers
tell each other their signed records over gRPC, so that routes never hang on one daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import grpc

from .. import petal_pb2 as pb
from ..petal_pb2_grpc import DirectoryStub
from ..trust.identity import Identity
from ..trust.trust import Trust
from ..wire.limits import DIRECTORY_OPTIONS
from .dht import DhtDirectory
from .directory import Connect, Directory, DirectoryError, Peers, RecordBook
from .records import RecordError, sign_record, tombstone

log = logging.getLogger(__name__)

# Peers remembered, and those of them that are told at a time.
MOST_MET = 256
FANOUT = 4
TELL_S = 3.0
Keep = Callable[[Sequence[str]], None]
# Records taken from one caller: its own, and no list.
MOST_HEARD = 1


class Acquaintances:
    """Whom this peer has met, the newest last; those who left are forgotten, those who are silent are not."""

    def __init__(self, trust: Trust, book: RecordBook, own: str) -> None:
        self._trust = trust
        self._book = book
        self._own = own
        self._met: dict[str, pb.PeerRecord] = {}

    def meet(self, records: Peers) -> bool:
        """Remember them; whether anybody was ever met."""
        for record in records:
            if record.peer_id != self._own and record.addresses:
                self._met.pop(record.peer_id, None)
                self._met[record.peer_id] = record
        while len(self._met) > MOST_MET:
            del self._met[next(iter(self._met))]
        return bool(self._met)

    def addresses(self) -> list[str]:
        """gRPC addresses, one for each."""
        return [record.addresses[0] for record in self._met.values()]

    def missed(self, present: Peers) -> list[pb.PeerRecord]:
        """Who was there once, and has neither a record now nor left."""
        left = {
            record.peer_id
            for record in (pb.PeerRecord.FromString(signed.record) for signed in self._book.signed())
            if record.state == pb.LEFT
        }
        for peer_id in left & self._met.keys():
            del self._met[peer_id]
        here = {record.peer_id for record in present}
        return [record for peer_id, record in self._met.items() if peer_id not in here]

    def multiaddrs(self) -> list[str]:
        """Ways into the DHT, one for each."""
        return [record.multiaddrs[0] for record in self._met.values() if record.multiaddrs]

    async def tell(self, own: pb.SignedRecord | None) -> bool:
        """Tell some this peer's record and hear all that they know; whether anybody answered."""
        missed = self.missed(self._book.list())
        there = [record for record in self._met.values() if record not in missed]
        chosen = [*_some(there), *_some(missed)]
        ways = [partial(self._trust.channel, r, r.addresses[0], DIRECTORY_OPTIONS) for r in chosen]
        return any(await asyncio.gather(*(self._tell(way, own) for way in ways)))

    async def _tell(self, connect: Connect, own: pb.SignedRecord | None) -> bool:
        try:
            async with connect() as channel:
                request = pb.ListRequest(records=[own] if own else [])
                reply = await DirectoryStub(channel).List(request, timeout=TELL_S)
        except (grpc.RpcError, OSError):
            return False
        for signed in reply.records:
            with contextlib.suppress(RecordError):
                self._book.add(signed)
        return True


def _some(records: list[pb.PeerRecord]) -> list[pb.PeerRecord]:
    return random.sample(records, min(FANOUT, len(records)))


class PublicDirectory(Directory):
    """See the module."""

    def __init__(
        self, dht: DhtDirectory, trust: Trust, own: str, seeds: Sequence[str] = (), keep: Keep = lambda addresses: None
    ) -> None:
        """`own`: this peer's id. `seeds`: where others may be, asked while nobody else is known; `keep` stores them."""
        self.book = dht.book
        self._seeds = list(dict.fromkeys(seeds))
        self._trust = trust
        self._keep = keep
        self._kept: set[str] = set()
        self._dht = dht
        self._met = Acquaintances(trust, dht.book, own)
        self._own: pb.SignedRecord | None = None

    async def list(self, model: str | None = None) -> Peers:
        """See Directory. DirectoryError where neither the DHT nor any peer that was met answers."""
        error = await _tried(self._dht.list(model))
        present = self.book.list()
        if not self._met.meet(present) and await self._ask_seeds():
            present, error = self.book.list(), None
            self._met.meet(present)
        self._remember()
        self._dht.remember(self._met.multiaddrs())
        if (error or self._met.missed(present)) and not await self._met.tell(self._own) and error:
            raise error
        return self.book.list(model)

    async def publish(self, signed: pb.SignedRecord) -> None:
        """Replace this peer's record. DirectoryError where nobody takes it."""
        self._own = signed
        error = await _tried(self._dht.publish(signed))
        self.book.add(signed)
        if error and not await self._met.tell(signed):
            raise error

    async def _ask_seeds(self) -> bool:
        """Whether anybody answers there; the DHT hears of the way to them."""
        asked = [address for address in self._seeds if not address.startswith("/")]
        answers = await asyncio.gather(*(self._ask_seed(address) for address in asked))
        return any(answers)

    async def _ask_seed(self, address: str) -> bool:
        request = pb.ListRequest(records=[self._own] if self._own else [])
        try:
            async with self._trust.dial(address, DIRECTORY_OPTIONS) as channel:
                reply = await DirectoryStub(channel).List(request, timeout=TELL_S)
        except (grpc.RpcError, OSError):
            return False
        for signed in reply.records:
            with contextlib.suppress(RecordError):
                self.book.add(signed)
        self._dht.remember(reply.bootstrap)
        return True

    def _remember(self) -> None:
        """For the next start; with the seeds, which led here."""
        addresses = self._met.addresses()
        if addresses and not {*addresses} <= self._kept:
            self._kept = {*addresses}
            self._keep([*dict.fromkeys([*self._seeds, *addresses])][-MOST_MET:])

    async def withdraw(self, identity: Identity, record: pb.PeerRecord) -> None:
        """Replace `record`, the last one published, by a tombstone.

        The others hear of it from this peer too: the DHT is content where a record reached its own node alone, which
        ends with the peer.
        """
        signed = sign_record(identity, tombstone(record))
        await self.publish(signed)
        await self._met.tell(signed)

    def hear(self, request: pb.ListRequest) -> None:
        """Take in a caller's own record, which it has signed."""
        for signed in request.records[:MOST_HEARD]:
            with contextlib.suppress(RecordError):
                self.book.add(signed)

    async def multiaddrs(self) -> Sequence[str]:
        """Where others can join the DHT through this peer."""
        return await self._dht.multiaddrs()

    async def close(self) -> None:
        await self._dht.close()


async def _tried(call: Awaitable[object]) -> DirectoryError | None:
    """Why a call of the DHT failed: a daemon that dies in the midst of it leaves errors of every kind."""
    try:
        await call
    except DirectoryError as error:
        return error
    except Exception as error:
        log.debug("a call of the DHT failed", exc_info=True)
        return DirectoryError(f"The DHT daemon failed: {error!r}.")
    return None
