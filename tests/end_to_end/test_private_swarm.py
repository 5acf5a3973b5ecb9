"""A private swarm end to end: who is invited works as in a public one, others get nothing, who is revoked is cut."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from petal.client.cli import private
from petal.client.cli.status import swarm_status
from petal.client.routing.peers import ConnectError
from petal.client.session.peer_error import PeerError
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from petal.peer.joining import ServeError
from petal.peer.limits.quotas import Quota, Quotas, Rule
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.directory import DirectoryError, GrpcDirectory
from petal.protocol.petal_pb2_grpc import DirectoryStub
from petal.protocol.private.admin import AdminServer
from petal.protocol.private.invites import InviteError
from petal.protocol.private.joining import join, join_as_admin
from petal.protocol.private.membership import Membership, request_for
from petal.protocol.trust.tls_key import TlsKey
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import DIRECTORY_OPTIONS

from ..support.private_swarms import PrivateSwarm, free_ports, private_swarm
from ..support.swarms import local_swarm
from ..support.tiny import tiny_llama
from ..support.trees import token_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [1, 5, 9, 4, 77]
SETTINGS = {"max_new_tokens": 8, "eos_token_id": -1}
CUT_S = 20.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[PrivateSwarm]:
    async with private_swarm(tiny_llama(), [range(0, 2), range(2, 4)]) as running:
        yield running


async def test_the_same_tokens_as_in_a_public_swarm(swarm: PrivateSwarm) -> None:
    async with swarm.connect() as client:
        said = await client.generate(PROMPT, **SETTINGS)
    async with local_swarm(tiny_llama(), [range(0, 4)]) as public, public.connect() as other:
        assert said == await other.generate(PROMPT, **SETTINGS)


async def test_keys_are_the_joiners_own_and_private(swarm: PrivateSwarm) -> None:
    keys = [*swarm.folder.rglob("*.key"), *swarm.folder.rglob("key.pem")]
    assert len(keys) >= 5
    assert {os.stat(path).st_mode & 0o777 for path in keys} == {0o600}


async def test_strangers_get_nothing(swarm: PrivateSwarm) -> None:
    peer = swarm.peers[0]
    for trust in (PublicTrust(), PublicTrust(peer.identity)):
        with pytest.raises((grpc.aio.AioRpcError, OSError)):
            async with trust.dial(peer.address, DIRECTORY_OPTIONS) as channel:
                await DirectoryStub(channel).List(pb.ListRequest(), timeout=5)
    with pytest.raises(ConnectError):
        await AsyncSwarmModel.connect(swarm.model, [peer.address])


async def test_members_of_another_swarm_get_nothing(swarm: PrivateSwarm) -> None:
    async with private_swarm(tiny_llama()) as other:
        foreign = other.authority.membership
        with pytest.raises(grpc.aio.AioRpcError):
            async with foreign.dial(swarm.peers[0].address, DIRECTORY_OPTIONS) as channel:
                await DirectoryStub(channel).List(pb.ListRequest(), timeout=5)


async def test_an_invitation_is_good_for_its_uses_and_its_role(swarm: PrivateSwarm) -> None:
    token = swarm.invite("client")
    await join(token, folder=swarm.folder / "first")
    with pytest.raises(InviteError, match="used up"):
        await join(token, folder=swarm.folder / "second")
    await join(token, folder=swarm.folder / "first")  # is a member already
    with pytest.raises(InviteError, match="for a peer"):
        await join(swarm.invite("peer"), folder=swarm.folder / "third")
    with pytest.raises(InviteError, match="expired"):
        await join(swarm.invite("client", lifetime_s=-5 + 5.001), folder=swarm.folder / "fourth")


async def test_there_is_no_libp2p_to_relay(swarm: PrivateSwarm) -> None:
    assert list(await swarm.peers[0].directory.multiaddrs()) == []
    with pytest.raises(ServeError, match="leave --relay out"):
        await swarm.serve(range(0, 2), relay=True)


async def test_of_two_at_once_one_joins(swarm: PrivateSwarm) -> None:
    token = swarm.invite("client")
    both = [join(token, folder=swarm.folder / name) for name in ("this", "that")]
    outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InviteError", "Membership"]


async def test_a_revoked_client_is_cut_everywhere(swarm: PrivateSwarm) -> None:
    async with swarm.connect("victim") as client, await client.open_session(64) as session:
        await session.prefill(PROMPT)
        swarm.authority.revoke(client.connection.channels.trust.name)
        started = time.monotonic()
        with pytest.raises(PeerError, match="membership of this swarm was revoked"):
            await _go_on(session, CUT_S)
        while any(peer.admission.sessions for peer in swarm.peers):
            assert time.monotonic() - started < CUT_S
            await asyncio.sleep(0.1)


async def _go_on(session: Session, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await session.prefill([7])
        await asyncio.sleep(0.2)


async def test_a_revoked_peer_is_left_and_the_text_goes_on(swarm: PrivateSwarm) -> None:
    await swarm.serve(range(0, 2))
    async with swarm.connect("bystander") as client:
        expected = await client.generate(PROMPT, **SETTINGS)
        session = await client.open_session(64)
        first = session.route[0].peer
        [revoked] = [peer for peer in swarm.peers if peer.identity.peer_id == first.peer_id]
        swarm.authority.revoke(revoked.trust.name)
        started = time.monotonic()
        while first.peer_id in {record.peer_id for record in client.connection.known._records}:
            await client.connection.known.look()
            assert time.monotonic() - started < CUT_S
            await asyncio.sleep(0.2)
        assert await client.generate(PROMPT, **SETTINGS) == expected
        session.close()
    # It hears of it, too, from whoever refuses it, and ends.
    await asyncio.wait_for(revoked.announcement.expelled.wait(), CUT_S)
    swarm.peers.remove(revoked)
    await revoked.stop()
    assert not any(peer.announcement.expelled.is_set() for peer in swarm.peers)


async def test_a_revoked_client_hears_why_it_is_refused(swarm: PrivateSwarm) -> None:
    member = await join(swarm.invite("client"), folder=swarm.folder / "refused")
    swarm.authority.revoke(member.name)
    directory = GrpcDirectory([peer.address for peer in swarm.peers[-1:]], trust=member)
    heard: list[str] = []
    end = time.monotonic() + CUT_S
    while not heard and time.monotonic() < end:
        try:
            await directory.list()
            await asyncio.sleep(0.3)
        except DirectoryError as error:
            heard.append(str(error))
    assert "membership was revoked" in heard[0]
    assert "ask an admin of the swarm for a new invitation" in heard[0]


async def test_a_stranger_at_a_private_peer_is_told_how_to_join(swarm: PrivateSwarm) -> None:
    with pytest.raises(DirectoryError, match="of a private swarm, which lets nobody in but by --join INVITATION"):
        await GrpcDirectory([swarm.peers[-1].address]).list()


@pytest.mark.parametrize("role", ["peer", "client", "admin"])
async def test_an_invitation_for_another_role_says_which_to_ask_for(swarm: PrivateSwarm, role: str) -> None:
    token = swarm.invite(role)
    if role != "client":
        with pytest.raises(InviteError, match=f"for an? {role}; ask .*--role client"):
            await join(token, folder=swarm.folder / "wrong")
    if role != "admin":
        with pytest.raises(InviteError, match=f"for an? {role}; ask .*--role admin"):
            await join_as_admin(token, "127.0.0.1:31400", swarm.folder / "wrong-admin")


async def test_a_second_admin_lets_members_in_and_goes_with_whom_it_let_in(swarm: PrivateSwarm) -> None:
    address = f"127.0.0.1:{free_ports()}"
    root_key = swarm.authority.folder / "root.key"
    offline = root_key.rename(swarm.folder / "offline")
    with pytest.raises(InviteError, match="needs the root key"):
        swarm.invite("admin")
    offline.rename(root_key)
    second = await join_as_admin(swarm.invite("admin"), address, swarm.folder / "second" / "lab")
    server = AdminServer(second, "127.0.0.1")
    await server.start()
    try:
        member = await join(second.invite("client", {}, 1, 60), folder=swarm.folder / "guest")
        assert await listed(member, swarm.peers[1].address)
        with pytest.raises(InviteError, match="no invitation of that"):
            swarm.authority.redeem(second.invite("client", {}, 1, 60), request_for(TlsKey.ephemeral(), None))
        swarm.authority.revoke(server.membership.name)
        started = time.monotonic()
        while await listed(member, swarm.peers[1].address):
            assert time.monotonic() - started < CUT_S
            await asyncio.sleep(0.2)
    finally:
        await server.stop()


async def test_without_an_admin_nobody_joins_and_all_else_goes_on(swarm: PrivateSwarm) -> None:
    token = swarm.invite("client")
    async with swarm.connect("old friend") as client:
        expected = await client.generate(PROMPT, **SETTINGS)
        await swarm.admin.stop()
        assert await client.generate(PROMPT, **SETTINGS) == expected
        with pytest.raises(InviteError, match="does not answer"):
            await join(token, folder=swarm.folder / "late")
        swarm.authority.rotate()
        swarm.admin = AdminServer(swarm.authority, "127.0.0.1")
        await swarm.admin.start()
        with pytest.raises(InviteError, match="admin"):  # signed with the former key
            await join(token, folder=swarm.folder / "late")
        newcomer = await join(swarm.invite("client"), folder=swarm.folder / "late")
        assert await listed(newcomer, swarm.peers[1].address)
        assert await client.generate(PROMPT, **SETTINGS) == expected
        trust = client.trusted_ends.trust
        before = trust.certificates[0]
        await trust.renew(None)
        assert trust.certificates[0] != before
        assert await client.generate(PROMPT, **SETTINGS) == expected, "with a new certificate, of the new admin key"
        peer = swarm.peers[1]
        await peer.trust.renew(peer.identity)
        assert await client.generate(PROMPT, **SETTINGS) == expected


async def listed(member: Membership, address: str) -> bool:
    try:
        async with member.dial(address, DIRECTORY_OPTIONS) as channel:
            await DirectoryStub(channel).List(pb.ListRequest(), timeout=5)
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_quotas_by_label_hold_on_the_wire() -> None:
    limits = Quota(sessions=1, tokens_per_minute=20, tree_nodes=3)
    async with private_swarm(tiny_llama()) as swarm:
        await swarm.serve(range(0, 4), quotas=Quotas((Rule(limits, label="lab=small"),)))
        small = swarm.invite("client", lab="small")
        async with swarm.connect("small", join=small) as client, swarm.connect("large") as other:
            session = await client.open_session(64)
            assert session.max_nodes == 3
            with pytest.raises(PeerError, match=r"quota here is 1 sessions.*retry") as refused:
                await client.open_session(64, wait_s=0)
            assert refused.value.busy
            with pytest.raises(PeerError, match="tree of 4 nodes; your quota here is 3"):
                await session.step(token_chain([1, 2, 3, 4, 5]))
            session = await client.open_session(64)
            await session.prefill([1] * 20)
            with pytest.raises(PeerError, match="20 tokens a minute; retry in"):
                await session.prefill([2] * 5)
            async with await other.open_session(64) as free:
                await free.prefill([1] * 40)
                await free.step(token_chain([1, 2, 3, 4, 5]))


async def test_a_member_has_one_id_everywhere(swarm: PrivateSwarm) -> None:
    peer = swarm.peers[-1]
    trust = await join(swarm.invite("client"), folder=swarm.folder / "looking")
    report = await swarm_status(GrpcDirectory([peer.address], trust=trust), trust)
    [said] = [one for model in report["models"] for one in model["peers"] if one["peer_id"] == peer.identity.peer_id]
    assert said["member"] == peer.trust.name
    assert said["member"] in {issue.name for issue in swarm.authority.ledger.issues()}
    found = await private._seen(swarm.authority)
    for _ in range(40):
        if said["member"] in found:
            break
        await asyncio.sleep(0.5)  # the admin hears of it with a beat
        found = await private._seen(swarm.authority)
    host, seen = found[said["member"]]
    assert host == "127.0.0.1"
    assert time.time() - seen < 60
