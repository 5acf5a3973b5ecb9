import asyncio
import random
import time
from functools import partial

import grpc
import pytest
from petal.protocol import petal_pb2 as pb
from petal.protocol import petal_pb2_grpc as rpc
from petal.protocol.directory.directory import (
    DirectoryError,
    DirectoryService,
    GrpcDirectory,
    RecordBook,
    ping,
    ping_all,
)
from petal.protocol.directory.public import PublicDirectory
from petal.protocol.directory.records import RecordError, sign_record, tombstone
from petal.protocol.trust.identity import Identity
from petal.protocol.wire.limits import DIRECTORY_OPTIONS

from ..support.servers import silent_server
from .records_for_tests import good_record, signed_record, trust_of

TRUSTED = Identity.ephemeral()
TRUST = trust_of(TRUSTED)
ALICE, BOB, EVE = Identity.ephemeral(), Identity.ephemeral(), Identity.ephemeral()


def ids(records):
    return {record.peer_id for record in records}


def listen(server: grpc.aio.Server) -> str:
    return f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', TRUST.server_credentials())}"


def damaged(signed: pb.SignedRecord) -> pb.SignedRecord:
    record = bytearray(signed.record)
    record[-1] ^= 1
    return pb.SignedRecord(record=bytes(record), public_key=signed.public_key, signature=signed.signature)


@pytest.fixture
async def serve():
    """Starts servers of given records; returns their addresses."""
    servers = []

    async def start(*records: pb.SignedRecord, peer_id: str = ALICE.peer_id) -> str:
        server = grpc.aio.server()
        service = DirectoryService(
            peer_id, state=lambda: pb.DRAINING, records=lambda model: records, bootstrap=lambda: ["/ip4/…"]
        )
        rpc.add_DirectoryServicer_to_server(service, server)
        address = listen(server)
        await server.start()
        servers.append(server)
        return address

    yield start
    await asyncio.gather(*(server.stop(None) for server in servers))


async def test_a_withdrawal_reaches_others_though_the_dht_kept_it_at_home():
    class Dht:
        book = RecordBook()

        async def publish(self, signed: pb.SignedRecord) -> None:
            """Kept by its own node, and by nobody else."""

        async def list(self, model: str | None) -> None: ...

        def remember(self, multiaddrs: object) -> None: ...

    theirs, service = RecordBook(), partial(DirectoryService, state=lambda: pb.ONLINE)
    heard = service(BOB.peer_id, records=theirs.signed, heard=lambda request: [*map(theirs.add, request.records)])
    server = grpc.aio.server()
    rpc.add_DirectoryServicer_to_server(heard, server)
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', trust_of(BOB).server_credentials())}"
    await server.start()
    directory = PublicDirectory(Dht(), TRUST, ALICE.peer_id)
    own = good_record(ALICE)
    assert theirs.add(sign_record(ALICE, own))
    directory.book.add(signed_record(BOB, addresses=[address]))
    await directory.list()
    await directory.publish(sign_record(ALICE, own))
    assert ids(theirs.list()) == {ALICE.peer_id}
    await directory.withdraw(ALICE, own)
    assert theirs.list() == []
    await server.stop(None)


@pytest.fixture
async def silent():
    """A server that accepts and says nothing."""
    async with silent_server() as server:
        yield server


NOBODY = "127.0.0.1:1"


class TestBook:
    def test_lists_by_model(self):
        book = RecordBook()
        assert book.add(signed_record(ALICE, "a"))
        assert book.add(signed_record(BOB, "b"))
        assert ids(book.list()) == {ALICE.peer_id, BOB.peer_id}
        assert ids(book.list("b")) == {BOB.peer_id}
        assert len(book.signed()) == 2
        assert len(book.signed("a")) == 1
        assert book.list("c") == []

    def test_what_it_lists_is_the_callers(self):
        book = RecordBook()
        book.add(signed_record(ALICE))
        book.list()[0].state = pb.LEFT
        assert ids(book.list()) == {ALICE.peer_id}

    def test_keeps_the_freshest(self):
        book = RecordBook()
        old, new = signed_record(ALICE, version=1), signed_record(ALICE, version=2, start=0, block_digests=[])
        assert book.add(new)
        assert not book.add(old)
        assert not book.add(new)
        assert [record.version for record in book.list()] == [2]

    def test_a_tombstone_cannot_be_undone(self):
        book = RecordBook()
        record = good_record(ALICE)
        book.add(sign_record(ALICE, record))
        assert book.add(sign_record(ALICE, tombstone(record)))
        assert book.list() == []
        assert not book.add(sign_record(ALICE, record))
        assert book.list() == []
        assert len(book.signed()) == 1

    def test_forgets_the_expired(self):
        book = RecordBook()
        book.add(signed_record(ALICE))
        assert book.list(now=time.time() + 29)
        assert book.list(now=time.time() + 40) == []
        assert book.add(signed_record(ALICE, version=0))

    def test_refuses_forgeries(self):
        book = RecordBook()
        with pytest.raises(RecordError):
            book.add(damaged(signed_record(ALICE)))
        assert book.list() == []

    def test_is_bounded(self, monkeypatch):
        monkeypatch.setattr("petal.protocol.directory.directory.MAX_PEERS", 1)
        book = RecordBook()
        assert book.add(signed_record(ALICE))
        assert not book.add(signed_record(BOB))
        assert book.add(signed_record(ALICE, version=2))
        assert book.add(signed_record(BOB), now=time.time() + 25) is False
        assert book.add(signed_record(BOB, expires_at=time.time() + 90), now=time.time() + 40)


async def test_lists_what_a_peer_serves(serve):
    address = await serve(signed_record(ALICE, "a"), signed_record(BOB, "b"))
    directory = GrpcDirectory([address])
    assert ids(await directory.list()) == {ALICE.peer_id, BOB.peer_id}
    assert ids(await directory.list("a")) == {ALICE.peer_id}
    assert await directory.list("c") == []
    await directory.close()


async def test_a_reply_is_bounded_and_names_the_bootstrap(serve, monkeypatch):
    monkeypatch.setattr("petal.protocol.directory.directory.MAX_REPLY_BYTES", 3500)
    address = await serve(*(signed_record(identity) for identity in (ALICE, BOB, EVE)))
    async with TRUST.dial(address, DIRECTORY_OPTIONS) as channel:
        reply = await rpc.DirectoryStub(channel).List(pb.ListRequest())
    assert len(reply.records) == 1
    assert list(reply.bootstrap) == ["/ip4/…"]


async def test_tries_the_next_address(serve, silent):
    addresses = [NOBODY, silent.address, await serve(signed_record(ALICE))]
    directory = GrpcDirectory(addresses, timeout_s=30.0, patience_s=0.1)
    assert ids(await directory.list()) == {ALICE.peer_id}
    directory._patience_s, asked = 30.0, len(silent.callers)
    assert asked
    assert ids(await directory.list()) == {ALICE.peer_id}
    assert len(silent.callers) == asked, "the address that answered comes first from now on"


async def test_a_silent_address_holds_nobody_up(serve, silent):
    started = time.monotonic()
    directory = GrpcDirectory([silent.address, await serve(signed_record(ALICE))], timeout_s=30.0)
    assert ids(await directory.list()) == {ALICE.peer_id}
    assert time.monotonic() - started < 20


async def test_nobody_answers(silent):
    started = time.monotonic()
    with pytest.raises(DirectoryError, match=rf"^No peer answered .*{NOBODY}.*{silent.address}.*check.*\.$"):
        await GrpcDirectory([NOBODY, silent.address], timeout_s=0.5).list()
    assert time.monotonic() - started < 20


async def test_an_empty_swarm_is_no_error(serve):
    assert await GrpcDirectory([NOBODY, await serve()]).list() == []


async def test_a_liar_is_not_believed(serve):
    good = signed_record(ALICE, version=5)
    stolen = pb.SignedRecord(record=good.record, public_key=EVE.public_key, signature=EVE.sign(good.record))
    expired = signed_record(BOB, expires_at=time.time() - 60)
    liar = await serve(damaged(good), stolen, expired, pb.SignedRecord(record=random.randbytes(200)))
    with pytest.raises(DirectoryError, match="not signed"):
        await GrpcDirectory([liar]).list()
    assert ids(await GrpcDirectory([liar, await serve(good)]).list()) == {ALICE.peer_id}
    half_liar = await serve(damaged(good), signed_record(BOB))
    assert ids(await GrpcDirectory([half_liar]).list()) == {BOB.peer_id}


async def test_replay_of_an_older_record(serve):
    new = good_record(ALICE, version=5, throughput=5.0)
    old = signed_record(ALICE, version=4, throughput=4.0)
    served = [sign_record(ALICE, new)]
    server = grpc.aio.server()
    service = DirectoryService(ALICE.peer_id, state=lambda: pb.ONLINE, records=lambda model: served)
    rpc.add_DirectoryServicer_to_server(service, server)
    directory = GrpcDirectory([listen(server)])
    await server.start()
    await directory.list()
    served[:] = [old]
    assert [record.throughput for record in await directory.list()] == [5.0]
    served[:] = [sign_record(ALICE, tombstone(new))]
    assert await directory.list() == []
    await server.stop(None)


async def test_peers_that_it_learned_of_are_asked_too(serve):
    second = await serve(signed_record(BOB))
    first = await serve(signed_record(TRUSTED, addresses=[second]))
    directory = GrpcDirectory([first])
    await directory.list()
    directory._addresses = [NOBODY]
    await directory.list()
    assert ids(await directory.list()) == {TRUSTED.peer_id, BOB.peer_id}


async def test_ping(serve, silent):
    address = await serve()
    started = time.monotonic()
    pong = await ping(partial(TRUST.dial, address, DIRECTORY_OPTIONS))
    assert (pong.peer_id, pong.state) == (ALICE.peer_id, pb.DRAINING)
    assert 0 < pong.rtt_s < time.monotonic() - started
    places = {ALICE: NOBODY, BOB: silent.address, EVE: address}
    records = [good_record(identity, addresses=[place]) for identity, place in places.items()]
    pongs = await ping_all([*records, good_record(TRUSTED, addresses=[address])], TRUST, timeout=2.0)
    assert {peer for peer, pong in pongs.items() if pong} == {TRUSTED.peer_id}, "Eve's record has another TLS key"
