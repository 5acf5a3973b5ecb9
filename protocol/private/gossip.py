"""The directory of a private swarm: members tell each other their records and revocation lists over mutual TLS.

No DHT: libp2p would show ids and addresses to whoever can connect. Here a stranger does not even finish a handshake.
Our own, because a membership library brings a transport of its own: this is one call, on the TLS that members have.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial

import grpc

from .. import petal_pb2 as pb
from ..directory.directory import Connect, Directory, DirectoryError, Peers, RecordBook
from ..directory.records import RecordError, sign_record, tombstone
from ..petal_pb2_grpc import DirectoryStub
from ..trust.identity import Identity
from ..trust.interceptor import revocations_with
from ..wire.limits import DIRECTORY_OPTIONS
from .membership import Membership

log = logging.getLogger(__name__)

# Everybody hears of a change within a few of these.
BEAT_S = 3.0
BEAT_TIMEOUT_S = 5.0
# Members told in one beat, beside one of the addresses to begin with.
FANOUT = 4
# A change of one's own is told to so many at once.
ANNOUNCE = 32


class GossipDirectory(Directory):
    """Tells a few members at a time what this one knows, and hears what they know."""

    def __init__(self, membership: Membership, address: str) -> None:
        """`address`: one's own, which is not asked."""
        self.book = RecordBook(membership)
        self._membership = membership
        self._address = address
        self._own: pb.SignedRecord | None = None
        self._beating: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Hear from whoever is there, and go on beating. Nobody there is no error: somebody is the first."""
        await self._beat(ANNOUNCE)
        self._beating = asyncio.create_task(self._run())

    async def list(self, model: str | None = None) -> Peers:
        """See Directory; what was heard so far."""
        return self.book.list(model)

    async def publish(self, signed: pb.SignedRecord) -> None:
        """Replace this peer's record; members hear of a change of its state at once, of all else with the next beat.

        DirectoryError where this peer is no member any more.
        """
        former, self._own = self._own, signed
        try:
            self.book.add(signed)
        except RecordError as error:
            raise DirectoryError(str(error)) from error
        if former is None or _state(former) != _state(signed):
            await self._beat(ANNOUNCE)

    async def withdraw(self, identity: Identity, record: pb.PeerRecord) -> None:
        """Replace `record`, the last one published, by a tombstone."""
        await self.publish(sign_record(identity, tombstone(record)))

    async def multiaddrs(self) -> Sequence[str]:
        """There is no libp2p here."""
        return ()

    async def close(self) -> None:
        if self._beating:
            self._beating.cancel()

    def hear(self, request: pb.ListRequest) -> None:
        """Take in what a member tells while it asks."""
        self._take(request.records, request.revocations)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S * random.uniform(0.8, 1.2))
            try:
                self._membership.reload()
                await self._beat(FANOUT)
            except Exception as error:  # a full disk, say: revocations must reach members all the same
                log.warning("A beat of the directory failed, the next comes in %.0f s: %s", BEAT_S, error)

    async def _beat(self, count: int) -> None:
        records = [r for r in self.book.list() if self._address not in r.addresses]
        ways: list[Connect] = [
            partial(self._membership.channel, record, record.addresses[0], DIRECTORY_OPTIONS)
            for record in random.sample(records, min(count, len(records)))
            if record.addresses
        ]
        seeds = [a for a in {self._membership.admin, *self._membership.addresses} if a and a != self._address]
        chosen = seeds if not records else random.sample(seeds, min(1, len(seeds)))
        ways += [partial(self._membership.dial, address, DIRECTORY_OPTIONS) for address in chosen]
        await asyncio.gather(*(self._tell(way) for way in ways))
        self._membership.remember([address for record in records for address in record.addresses[:1]])

    async def _tell(self, connect: Connect) -> None:
        request = pb.ListRequest(records=[self._own] if self._own else [], revocations=self._membership.revocations)
        try:
            async with connect() as channel:
                reply = await DirectoryStub(channel).List(request, timeout=BEAT_TIMEOUT_S)
                self._take(reply.records, reply.revocations)
        except grpc.aio.AioRpcError as refusal:
            self._membership.learn(revocations_with(refusal))  # may name this very member
        except OSError:
            return  # they are told again, or their records expire

    def _take(self, records: Sequence[pb.SignedRecord], revocations: Sequence[pb.RevocationList]) -> None:
        self._membership.learn(revocations)
        for signed in records:
            try:
                self.book.add(signed)
            except RecordError as error:
                log.debug("refused a record: %s", error)


async def tell_all(membership: Membership) -> int:
    """Tell the members that this one knows of the newest revocation lists; returns how many have heard."""

    async def tell(address: str) -> bool:
        try:
            async with membership.dial(address, DIRECTORY_OPTIONS) as channel:
                request = pb.ListRequest(model="-", revocations=membership.revocations)
                await DirectoryStub(channel).List(request, timeout=BEAT_TIMEOUT_S)
        except (grpc.RpcError, OSError):
            return False
        return True

    return sum(await asyncio.gather(*(tell(address) for address in membership.addresses)))


def _state(signed: pb.SignedRecord) -> pb.PeerState:
    return pb.PeerRecord.FromString(signed.record).state
