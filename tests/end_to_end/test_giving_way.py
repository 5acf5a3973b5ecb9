"""One stranger cannot hold a peer: what is idle gives way, and its client goes on by replay."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from petal.client.session.session import Session
from petal.peer.limits import admission
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.sampling import SamplingParams

from ..support.disturbed import plain_steps
from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import Wire, released

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
PROMPT = [1, 5, 9, 4, 77, 30, 31, 32]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Two spans, with room for three sessions of 256 tokens each."""
    async with local_swarm(tiny_llama(), [range(0, 2), range(2, 4)], cache_tokens=768) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever does not compute right now is idle."""
    monkeypatch.setattr(admission, "GIVE_WAY_S", 0.0)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_leaks(swarm: LocalSwarm) -> AsyncIterator[None]:
    yield
    for peer in swarm.peers:
        await released(peer)


async def start(session: Session) -> int:
    token = (await session.prefill(PROMPT, SamplingParams())).next_token
    assert token is not None
    return token


async def test_a_stranger_with_every_page_keeps_nobody_out(swarm: LocalSwarm) -> None:
    """Even where its sessions are not idle for long: it holds more than its share."""
    async with Wire(swarm.peers[0]) as stranger:
        held = [(await stranger.session(reserve_tokens=256))[0] for _ in range(3)]
        async with swarm.connect() as client, await client.open_session(256) as session:
            await plain_steps(session, await start(session), 4)
            await held[0].refused(Code.ABORTED, "this session gave way to others; resume it where there is room")
            assert swarm.peers[0].admission.sessions == 3


async def test_among_strangers_the_idle_ones_give_way(swarm: LocalSwarm, impatient: None) -> None:
    async with Wire(swarm.peers[0]) as wire:
        callers = [PublicTrust() for _ in range(4)]
        streams = [wire.stream() for _ in callers]
        for stream, caller in zip(streams, callers, strict=True):
            await stream.open(**wire.opening(caller, reserve_tokens=256))
        await streams[0].refused(Code.ABORTED, "gave way")
        assert swarm.peers[0].admission.sessions == 3


async def test_a_session_that_gave_way_goes_on_by_replay(swarm: LocalSwarm, impatient: None) -> None:
    async with swarm.connect() as client, swarm.connect() as other:
        async with await client.open_session(256) as session:
            expected = await plain_steps(session, await start(session), 12)
        async with await client.open_session(256) as session:
            said = await plain_steps(session, await start(session), 6)
            async with await other.open_session(640) as large:
                await start(large)
                assert [peer.admission.sessions for peer in swarm.peers] == [1, 1]
            assert said[:-1] + await plain_steps(session, said[-1], 7) == expected
            assert session.take_events(), "it had to resume"
