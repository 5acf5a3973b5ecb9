"""A public swarm's connections: a peer is whom its record names, a caller whom its hello names, nothing is plain."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from petal.protocol import petal_pb2 as pb
from petal.protocol.petal_pb2_grpc import DirectoryStub
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust, TrustError
from petal.protocol.wire.limits import DIRECTORY_OPTIONS

from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import CALLER, Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
STRANGER = PublicTrust(Identity.ephemeral())


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    async with local_swarm(tiny_llama(), [range(0, 4)]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def wire(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with Wire(swarm.peers[0]) as wire:
        yield wire


async def pinged(channel: grpc.aio.Channel) -> bool:
    async with channel:
        try:
            return bool(await DirectoryStub(channel).Ping(pb.PingRequest(), timeout=5))
        except grpc.aio.AioRpcError as error:
            assert error.code() == Code.UNAVAILABLE  # noqa: PT017
            return False


async def test_only_the_key_of_the_record_is_spoken_to(wire: Wire) -> None:
    imposter = pb.PeerRecord(certificates=STRANGER.certificates)
    assert await pinged(CALLER.channel(wire.record, wire.peer.address))
    assert not await pinged(CALLER.channel(imposter, wire.peer.address))


async def test_a_man_in_the_middle_with_the_same_name_is_not_spoken_to(wire: Wire) -> None:
    middle = PublicTrust(wire.peer.identity)  # the same names, another TLS key
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', middle.server_credentials())}"
    await server.start()
    assert not await pinged(CALLER.channel(wire.record, address))
    await server.stop(None)


async def test_nothing_is_plain(wire: Wire) -> None:
    assert not await pinged(grpc.aio.insecure_channel(wire.peer.address))


@pytest.mark.parametrize(("version", "served"), [(ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)])
async def test_tls_1_3_only(wire: Wire, version: ssl.TLSVersion, served: bool) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, port = wire.peer.address.split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    except OSError:
        assert not served
    else:
        assert served
        writer.transport.abort()


@pytest.mark.parametrize("said", [{}, {"ssl_tls_version": [b"TLSv1.2"]}, {"ssl_tls_version": [b"TLSv1.3", b"TLSv1.2"]}])
async def test_a_call_over_anything_else_is_refused_as_well(said: dict[str, list[bytes]]) -> None:
    with pytest.raises(TrustError, match=r"TLSv1\.3 only"):
        CALLER.admit(said)
    CALLER.admit({"ssl_tls_version": [b"TLSv1.3"]})


async def test_a_hello_is_good_for_one_session_at_one_peer_and_start(wire: Wire) -> None:
    session_id = b"s" * 16
    record = pb.PeerRecord()
    record.CopyFrom(wire.record)
    record.hello_nonce = b"of another start"
    elsewhere = pb.PeerRecord(certificates=STRANGER.certificates, hello_nonce=wire.record.hello_nonce)
    forged = STRANGER.hello(wire.record, session_id)
    forged.public_key = CALLER.hello(wire.record, session_id).public_key
    for hello in (
        CALLER.hello(wire.record, b"another session!"),
        CALLER.hello(record, session_id),
        CALLER.hello(elsewhere, session_id),
        forged,
        pb.Hello(),
    ):
        session = wire.stream()
        await session.send(open=pb.Open(**wire.opening(session_id=session_id, hello=hello)))
        await session.refused(Code.UNAUTHENTICATED, "hello is not signed")
    session = wire.stream()
    assert (await session.open(**wire.opening(session_id=session_id))).link_token


async def test_a_victims_client_id_is_of_no_use(wire: Wire) -> None:
    session = wire.stream()
    await session.send(open=pb.Open(**wire.opening(STRANGER, client_id=CALLER.client_id)))
    await session.refused(Code.UNAUTHENTICATED, "client_id is not of the key")


async def test_who_dials_asks_whoever_is_there(wire: Wire) -> None:
    trust = PublicTrust()
    async with trust.dial(wire.peer.address, DIRECTORY_OPTIONS) as channel:
        assert (await DirectoryStub(channel).Ping(pb.PingRequest())).peer_id == wire.record.peer_id
