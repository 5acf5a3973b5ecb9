"""Attacks on running swarms: whoever has no invitation, no uses left, no membership any more, or another's names."""

from __future__ import annotations

import asyncio
import secrets
import ssl

import grpc
from petal.protocol import petal_pb2 as pb
from petal.protocol.petal_pb2_grpc import AdminStub, DirectoryStub
from petal.protocol.private.certificates import ANY_MEMBER
from petal.protocol.private.invites import InviteError
from petal.protocol.private.joining import join
from petal.protocol.private.membership import Membership, request_for
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.tls_key import TlsKey, pem_of
from petal.protocol.trust.trust import PublicTrust, Trust
from petal.protocol.wire.limits import DIRECTORY_OPTIONS

from tests.support.private_swarms import PrivateSwarm, private_swarm
from tests.support.tiny import tiny_llama
from tests.support.wire import ANSWER_S, CALLER, Wire

from .tally import Tally

AT_ONCE = 64


async def strangers(tally: Tally, swarm: PrivateSwarm) -> None:
    """Who has no certificate of this swarm: of a public one, of another, plain, of TLS 1.2; and a man in the middle."""
    peer = swarm.peers[0]
    async with private_swarm(tiny_llama()) as other:
        for attack, trust in (
            ("stranger with a stolen address", PublicTrust()),
            ("stranger with a peer's identity", PublicTrust(peer.identity)),
            ("member of a foreign swarm", other.authority.membership),
        ):
            for address in (peer.address, swarm.authority.members_at):
                tally.count(attack, await _listed(trust, address))
    async with grpc.aio.insecure_channel(peer.address) as channel:
        tally.count("downgrade to plaintext", await _listed_on(channel))
    tally.count("downgrade to TLS 1.2", await _handshake(peer.address, ssl.TLSVersion.TLSv1_2))
    member = await join(swarm.invite("client"), folder=swarm.folder / "visitor")
    middle = grpc.aio.server()
    shown = PublicTrust(peer.identity).server_credentials()
    address = f"127.0.0.1:{middle.add_secure_port('127.0.0.1:0', shown)}"
    await middle.start()
    async with member.channel(peer.record(), address) as channel:
        tally.count("man in the middle", await _reached(channel))
    await middle.stop(None)


async def invitations(tally: Tally, swarm: PrivateSwarm) -> None:
    """One use, many who want it at once; afterwards nobody."""
    token = swarm.invite("client")
    racers = [join(token, folder=swarm.folder / f"racer-{n}") for n in range(8)]
    outcomes = await asyncio.gather(*racers, return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, Membership)]
    assert len(winners) >= 1, outcomes
    for _ in range(7):
        tally.count("two redemptions at once", False)
    tally.accepted["two redemptions at once"] += len(winners) - 1
    with tally.refuses("stolen token after its uses", InviteError):
        await join(token, folder=swarm.folder / "thief")


async def revoked(tally: Tally, swarm: PrivateSwarm) -> None:
    """Who was put out is refused, and cannot renew."""
    member = await join(swarm.invite("client"), folder=swarm.folder / "outcast")
    address = swarm.authority.members_at
    assert await _listed(member, address)
    swarm.authority.revoke(member.name)
    swarm.admin.membership.reload()
    tally.count("revoked member", await _listed(member, address))
    with tally.refuses("renewal of a revoked member", grpc.aio.AioRpcError):
        await member.renew(None)


async def renewals(tally: Tally, swarm: PrivateSwarm) -> None:
    """A member asks for a certificate in another's name, or shows one that it has no key for."""
    peer = swarm.peers[0]
    victim = await join(swarm.invite("client"), folder=swarm.folder / "victim")
    thief = await join(swarm.invite("client"), folder=swarm.folder / "impostor")
    overheard = request_for(TlsKey.load(victim.folder / "key.pem"), None)
    forged = request_for(TlsKey.ephemeral(), Identity.ephemeral())
    forged.identity = peer.identity.public_key
    for request in (
        overheard,
        forged,
        request_for(TlsKey.ephemeral(), peer.identity),
        request_for(TlsKey.ephemeral(), None),
        pb.CertificateRequest(csr=overheard.csr, identity=forged.identity, identity_signature=b"x" * 256),
    ):
        with tally.refuses("renewal in another's name", grpc.aio.AioRpcError):
            async with thief.dial(swarm.authority.members_at, DIRECTORY_OPTIONS) as channel:
                await AdminStub(channel).Renew(request, timeout=ANSWER_S)
    root, key = pem_of([thief.root_der]), TlsKey.load(thief.folder / "key.pem").pem
    for stolen in (victim.certificates, peer.trust.certificates, swarm.authority.membership.certificates):
        credentials = grpc.ssl_channel_credentials(root, key, pem_of(stolen))
        options = [("grpc.ssl_target_name_override", ANY_MEMBER)]
        async with grpc.aio.secure_channel(swarm.authority.members_at, credentials, options) as channel:
            with tally.refuses("another's certificate without its key", grpc.aio.AioRpcError):
                await AdminStub(channel).Renew(overheard, timeout=ANSWER_S)
    async with thief.dial(swarm.authority.members_at, DIRECTORY_OPTIONS) as channel:
        own = request_for(TlsKey.load(thief.folder / "key.pem"), None)
        assert (await AdminStub(channel).Renew(own, timeout=ANSWER_S)).certificates, "its own it may renew"


async def hijacks(tally: Tally, wire: Wire) -> None:
    """Sessions of others by guessed or known ids, links by guessed tokens, a victim's client id."""
    victim = wire.opening()
    session = wire.stream()
    opened = await session.open(**victim)
    for _ in range(tally.rounds):
        thief = PublicTrust()
        stolen = victim["session_id"]
        tries = [
            ("session of another reopened", wire.opening(thief, session_id=stolen, route_epoch=2)),
            ("session of another forked", wire.opening(thief, fork_of=stolen)),
            ("session forked by a guessed id", wire.opening(thief, fork_of=secrets.token_bytes(16))),
            ("a victim's client id", wire.opening(thief, client_id=CALLER.client_id)),
        ]
        for attack, fields in tries:
            tally.count(attack, await _opened(wire, fields))
        link = wire.link()
        await link.send(hello=wire.link_hello(stolen, secrets.token_bytes(16), 1))
        with tally.refuses("link by a guessed token", grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await link.read()
    assert opened.link_token
    await session.step(1, [1, 5, 9], prefill=True, sample=True)
    assert (await session.result()).sampled, "the victim goes on"


async def named_addresses(tally: Tally, wire: Wire) -> None:
    """A client that wants a peer to dial somebody who is no peer."""
    met: list[asyncio.StreamWriter] = []
    victim = await asyncio.start_server(lambda _, writer: met.append(writer), "127.0.0.1", 0)
    async with victim:
        port = victim.sockets[0].getsockname()[1]
        forms = ("{}", "ipv4:{}", "dns:///{}", "https://{}", "/ip4/127.0.0.1/tcp/" + str(port))
        for form in forms:
            session, _ = await wire.session(end=2)
            await session.send(
                link_to=pb.LinkTo(peer_id=form.format(f"127.0.0.1:{port}"), token=b"t" * 16, route_epoch=1)
            )
            assert (await session.read()).HasField("fault")
            tally.count("a victim's address in place of a peer", bool(met))
            session.close()
            wire.forget(session)


async def flood(wire: Wire, sessions: int) -> int:
    """Sessions opened and dropped, some in mid-step; returns how many were opened."""
    opened, todo = 0, iter(range(sessions))

    async def worker() -> None:
        nonlocal opened
        for number in todo:
            stream = wire.stream()
            try:
                await stream.open(**wire.opening(reserve_tokens=16))
                opened += 1
                if number % 3 == 0:
                    await stream.step(1, [1, 5, 9], prefill=True)
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error  # noqa: PT017
            stream.close()
            wire.forget(stream)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return opened


async def _opened(wire: Wire, fields: dict) -> bool:
    stream = wire.stream()
    try:
        await stream.open(**fields)
    except grpc.aio.AioRpcError:
        return False
    finally:
        stream.close()
        wire.forget(stream)
    return True


async def _listed(trust: Trust, address: str) -> bool:
    try:
        async with trust.dial(address, DIRECTORY_OPTIONS) as channel:
            return await _listed_on(channel)
    except (OSError, grpc.aio.AioRpcError):
        return False


async def _listed_on(channel: grpc.aio.Channel) -> bool:
    try:
        await DirectoryStub(channel).List(pb.ListRequest(), timeout=ANSWER_S)
    except grpc.aio.AioRpcError:
        return False
    return True


async def _reached(channel: grpc.aio.Channel) -> bool:
    """Whether the other end's key was believed: then it would say that it knows no such method."""
    try:
        await DirectoryStub(channel).Ping(pb.PingRequest(), timeout=ANSWER_S)
    except grpc.aio.AioRpcError as error:
        return error.code() != grpc.StatusCode.UNAVAILABLE
    return True


async def _handshake(address: str, version: ssl.TLSVersion) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    host, port = address.rsplit(":", 1)
    try:
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    except OSError:
        return False
    writer.transport.abort()
    return True
