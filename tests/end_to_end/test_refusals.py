"""One peer's word is no reason to give up: broken and hostile peers are passed by."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio
from petal.client.session import pace
from petal.client.session.peer_error import PeerError, Refusals
from petal.client.swarm import AsyncSwarmModel
from petal.peer.server import PeerServer
from petal.peer.session.session import PeerSession
from petal.peer.session.spec import SessionFailed
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.sampling import SamplingParams

from ..support.disturbed import plain_steps
from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
PROMPT = [1, 5, 9, 4, 77, 30, 31, 32]
WORDS = [
    Code.NOT_FOUND,
    Code.INVALID_ARGUMENT,
    Code.UNAUTHENTICATED,
    Code.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION,
    Code.UNIMPLEMENTED,
    Code.DEADLINE_EXCEEDED,
    Code.ABORTED,
    Code.INTERNAL,
    Code.UNKNOWN,
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Three peers with the whole model each."""
    async with local_swarm(tiny_llama(), [range(0, 4)] * 3) as running:
        yield running


@contextmanager
def refusing(peers: Sequence[PeerServer], code: grpc.StatusCode) -> Iterator[list[str]]:
    """Meanwhile these peers open no session; who was asked."""
    asked: list[str] = []

    def opening(peer: PeerServer) -> Any:
        def open_(*_: Any) -> None:
            asked.append(peer.identity.peer_id)
            raise SessionFailed(code, "not you")

        return open_

    with pytest.MonkeyPatch.context() as patched:
        for peer in peers:
            patched.setattr(peer.service.sessions, "open", opening(peer))
        yield asked


async def prefer(client: AsyncSwarmModel, peers: Sequence[PeerServer]) -> None:
    """All of them are known, and routes lead through the first ones first."""
    while len(client.connection.known.reachable()) < len(peers):
        await client.connection.known.look()
    for seconds, peer in enumerate(peers):
        client.connection.known.rtt_s[peer.identity.peer_id] = 10.0 * seconds


async def answer(client: AsyncSwarmModel) -> list[int]:
    pieces = client.stream(PROMPT, max_new_tokens=8, drafter="none")
    return [token async for piece in pieces for token in piece.ids]


def end_sessions(peer: PeerServer) -> None:
    """As if its connections broke."""
    for session in peer.service.sessions._running.values():
        session.fail(SessionFailed(Code.UNAVAILABLE, "gone"))


def peer_of(swarm: LocalSwarm, client_route: Any) -> PeerServer:
    return next(peer for peer in swarm.peers if peer.identity.peer_id == client_route[0].peer.peer_id)


@pytest.mark.parametrize("code", WORDS, ids=lambda code: code.name)
async def test_a_peer_that_opens_no_session_is_passed_by(swarm: LocalSwarm, code: grpc.StatusCode) -> None:
    async with swarm.connect() as client:
        await prefer(client, swarm.peers)
        with refusing(swarm.peers[:1], code) as asked:
            async with await client.open_session(128) as session:
                assert asked == [swarm.peers[0].identity.peer_id]
                assert peer_of(swarm, session.route) is swarm.peers[1]
                assert (await session.prefill(PROMPT)).hidden is None


@pytest.mark.parametrize("code", WORDS, ids=lambda code: code.name)
async def test_a_session_that_lost_its_peer_passes_by_who_refuses(swarm: LocalSwarm, code: grpc.StatusCode) -> None:
    """The spare that is nearest refuses; the next one takes over, and the text is the same."""
    async with swarm.connect() as client:
        plain = await answer(client)
        await prefer(client, swarm.peers)
        said: list[int] = []
        with refusing(swarm.peers[1:2], code) as asked:
            async for piece in client.stream(PROMPT, max_new_tokens=8, drafter="none"):
                if not said:
                    end_sessions(swarm.peers[0])
                said += piece.ids
        assert asked == [swarm.peers[1].identity.peer_id]
        assert said == plain


@pytest.mark.parametrize("code", [*WORDS, Code.UNAVAILABLE], ids=lambda code: code.name)
async def test_a_session_that_its_peer_does_not_fork_is_forked_elsewhere(
    swarm: LocalSwarm, code: grpc.StatusCode
) -> None:
    """Another peer computes its rows anew, and both say the same."""
    async with swarm.connect() as client:
        await prefer(client, swarm.peers)
        async with await client.open_session(128) as session:
            token = (await session.prefill(PROMPT, SamplingParams())).next_token
            assert token is not None
            said = await plain_steps(session, token, 3)
            with refusing(swarm.peers[:1], code) as asked:
                child = await session.fork()
            assert asked == [swarm.peers[0].identity.peer_id]
            assert peer_of(swarm, child.route) is not swarm.peers[0]
            assert await plain_steps(child, said[-1], 4) == await plain_steps(session, said[-1], 4)
            child.close()


async def test_a_peer_without_room_for_a_fork_is_believed(swarm: LocalSwarm) -> None:
    async with swarm.connect() as client:
        await prefer(client, swarm.peers)
        async with await client.open_session(128) as session:
            await session.prefill(PROMPT)
            with refusing(swarm.peers[:1], Code.RESOURCE_EXHAUSTED), pytest.raises(PeerError, match="not you"):
                await session.fork()


async def test_what_two_say_alike_is_true(swarm: LocalSwarm) -> None:
    async with swarm.connect() as client:
        await prefer(client, swarm.peers)
        with refusing(swarm.peers, Code.INVALID_ARGUMENT) as asked, pytest.raises(PeerError, match="not you"):
            await client.open_session(128)
        assert asked == [peer.identity.peer_id for peer in swarm.peers[:2]], "a third one need not be asked"


async def test_the_only_peer_that_is_left_has_the_last_word(swarm: LocalSwarm) -> None:
    async with swarm.connect() as client:
        await prefer(client, swarm.peers)
        for peer in swarm.peers[1:]:
            client.connection.known.ban(peer.identity.peer_id)
        with refusing(swarm.peers[:1], Code.NOT_FOUND), pytest.raises(PeerError, match="not you"):
            await client.open_session(128)


@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED, Code.PERMISSION_DENIED, Code.ABORTED])
async def test_a_peer_that_refuses_every_step_is_left(
    swarm: LocalSwarm, code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile, on_step = swarm.peers[0], PeerSession.on_step

    def refuse(session: PeerSession, message: pb.Step, size: int) -> None:
        if session.spec.peer_id == hostile.identity.peer_id:
            raise SessionFailed(code, "not this step")
        on_step(session, message, size)

    async with swarm.connect() as client:
        plain = await answer(client)
        await prefer(client, swarm.peers)
        monkeypatch.setattr(PeerSession, "on_step", refuse)
        assert (await answer(client)) == plain


def said(peer_id: str, place: str, code: grpc.StatusCode = Code.NOT_FOUND) -> PeerError:
    return PeerError(peer_id, code, "not you", peer_id, place)


async def test_two_identities_at_one_place_are_one_voice() -> None:
    def settled(*words: PeerError) -> bool:
        refusals = Refusals()
        return [refusals.add(word) for word in words][-1]

    assert not settled(said("a", "10.0.0.1"), said("b", "10.0.0.1")), "identities cost nothing"
    assert not settled(said("a", "10.0.0.1"), said("a", "10.0.0.2")), "nor do addresses of one identity"
    assert not settled(said("a", "10.0.0.1"), said("b", "10.0.0.2", Code.ABORTED)), "it says something else"
    assert settled(said("a", "10.0.0.1"), said("b", "10.0.0.2"))


async def test_a_peer_whose_compute_hangs_is_left_for_a_spare(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop lives and answers pings; only its answer does not come."""
    monkeypatch.setattr(pace, "FLOOR_S", 0.5)
    gate = threading.Event()
    async with swarm.connect() as client:
        plain = await answer(client)
        await prefer(client, swarm.peers)
        said: list[int] = []
        async for piece in client.stream(PROMPT, max_new_tokens=8, drafter="none"):
            if not said:
                swarm.peers[0].engine.call(lambda: gate.wait(60) and None)
            said += piece.ids
        gate.set()
        assert said == plain
