"""Peers fail in mid-session, at every place and every moment; the tokens stay those of an undisturbed run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import torch
from petal.client.config import GenerationConfig
from petal.client.drafting.ngram import NgramDrafter
from petal.client.routing.route import NoRoute
from petal.client.session.peer_error import PeerError

from ..support.disturbed import (
    PARAMS,
    PROMPT,
    SPANS,
    TOKENS,
    Disturbed,
    crash,
    disturbed,
    draining,
    plain_steps,
    replayed,
    undisturbed,
)
from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama
from ..support.tiny_drafter import tiny_drafter
from ..support.trees import token_chain
from ..support.wire import released

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Two peers for each of three spans."""
    async with local_swarm(tiny_llama(), [*SPANS, *SPANS], exact=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bare() -> AsyncIterator[LocalSwarm]:
    """One peer for each span."""
    async with local_swarm(tiny_llama(), SPANS, exact=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def expected(swarm: LocalSwarm) -> list[int]:
    async with swarm.connect(exact=True) as client:
        return await undisturbed(client)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_leaks(swarm: LocalSwarm) -> AsyncIterator[None]:
    yield
    for peer in swarm.peers:
        await released(peer)
        assert peer.service.sessions.replay_budget.used == 0


FULL = pytest.mark.full
PLACES = pytest.mark.parametrize(
    "places",
    [
        pytest.param([0], id="head"),
        pytest.param([1], id="middle"),
        pytest.param([2], id="tail"),
        pytest.param([0, 1], id="head+middle", marks=FULL),
        pytest.param([1, 2], id="middle+tail", marks=FULL),
        pytest.param([0, 2], id="head+tail", marks=FULL),
        pytest.param([0, 1, 2], id="all"),
    ],
)


@PLACES
async def test_crash_between_two_steps(swarm: LocalSwarm, expected: list[int], places: list[int]) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        for _ in range(3):
            await run.step(6)
        await run.crash(places)
        assert await run.finish() == expected
        events = run.session.take_events()
        assert events
        assert all(len(event.replacements) >= 1 for event in events)
        assert max(event.pause_s for event in events) < 5


@PLACES
@pytest.mark.parametrize(
    "waiting_for",
    [pytest.param(0, id="at-head", marks=FULL), pytest.param(1, id="at-middle"), pytest.param(2, id="at-tail")],
)
async def test_crash_with_a_tree_in_flight(
    swarm: LocalSwarm, expected: list[int], places: list[int], waiting_for: int
) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(6)
        async with run.held(waiting_for):
            step = asyncio.create_task(run.step(12))
            await asyncio.sleep(0.02)
            assert not step.done()
            await run.crash(places)
        await step
        assert await run.finish() == expected


@PLACES
async def test_crash_in_the_middle_of_a_prefill(swarm: LocalSwarm, expected: list[int], places: list[int]) -> None:
    async with disturbed(swarm, expected) as run:
        async with run.held(2):
            prefill = asyncio.create_task(run.prefill())
            await asyncio.sleep(0.03)
            assert not prefill.done()
            await run.crash(places)
        await prefill
        assert await run.finish() == expected


# Other states of a session.


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_a_rewind_that_no_peer_has_heard_of(swarm: LocalSwarm, expected: list[int], place: int) -> None:
    """An accepted tree and a rewind into it are both still to be told when the peer crashes."""
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        while len(run.said) < 12:
            await run.step(8)
        said = [*PROMPT, *run.said]
        run.session.rewind(len(PROMPT) + 6)
        await run.crash([place])
        result = await run.session.prefill(said[len(PROMPT) + 6 : len(PROMPT) + 8])
        assert result.next_token is None
        [event] = run.session.take_events()
        assert len(event.replacements) == 1
        again = await run.session.step(token_chain([said[len(PROMPT) + 8]]), PARAMS)
        assert run.session.ids == said[: len(PROMPT) + 9]
        async with swarm.connect(exact=True) as other, await other.open_session(256) as fresh:
            await fresh.prefill(PROMPT, PARAMS)
            for token in run.said[:6]:
                await fresh.step(token_chain([token]))
            await fresh.prefill(run.said[6:8])
            assert again.next_token == (await fresh.step(token_chain([run.said[8]]))).next_token


async def test_a_fork_of_a_session_that_moved(swarm: LocalSwarm, expected: list[int]) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(6)
        await run.crash([1])
        await run.step(6)
        async with await run.session.fork() as child:
            await run.crash([0])
            said, count = run.said, TOKENS - len(run.said) + 1
            assert [*said[:-1], *await plain_steps(child, said[-1], count)] == expected
            assert [*said[:-1], *await plain_steps(run.session, said[-1], count)] == expected


@pytest.mark.parametrize("codec", ["bf16", "int8"])
async def test_the_log_replays_the_very_bytes(swarm: LocalSwarm, codec: str) -> None:
    """A lossy codec loses the same again."""
    async with swarm.connect(exact=True, codec=codec) as client:
        answers = []
        for crashes in (False, True):
            async with await client.open_session(256) as session:
                token = (await session.prefill(PROMPT, PARAMS)).next_token
                said = await plain_steps(session, token, 8)
                if crashes:
                    await Disturbed(swarm, session, []).crash([1, 2])
                answers.append([*said[:-1], *await plain_steps(session, said[-1], 24)])
        assert answers[0] == answers[1]


async def test_a_newcomer_that_is_full_is_waited_for(swarm: LocalSwarm, expected: list[int]) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        [lost] = run.peers([1])
        [other] = [peer for peer in swarm.peers if peer.blocks == SPANS[1] and peer is not lost]
        other.admission.max_sessions, before = 0, other.admission.max_sessions
        lost.service.sessions.draining = True  # it takes no session back either
        await run.crash([1])
        step = asyncio.create_task(run.step(4))
        await asyncio.sleep(0.5)
        assert not step.done()
        other.admission.max_sessions = before
        await asyncio.wait_for(step, 10)
        lost.service.sessions.draining = False
        assert await run.finish() == expected


# Where the log does not help.


@pytest.mark.parametrize("places", [[1], [2], [0, 2]], ids=["middle", "tail", "head+tail"])
async def test_a_lost_log_is_made_up_for_by_token_ids(
    swarm: LocalSwarm, expected: list[int], places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers that keep nothing: the head gets the tokens again, and everybody behind it computes anew."""
    for peer in swarm.peers:
        monkeypatch.setattr(peer.service.sessions.replay_budget, "_cap", 0)
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(6)
        await run.crash(places)
        assert await run.finish() == expected


async def test_peers_fail_while_others_take_over(swarm: LocalSwarm, expected: list[int]) -> None:
    """The newcomer crashes with the replay under way."""
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(6)
        [newcomer] = [
            peer
            for peer in swarm.peers
            if peer.blocks == SPANS[1] and peer.identity.peer_id != run.session.route[1].peer.peer_id
        ]
        gate = threading.Event()
        newcomer.engine.call(lambda: gate.wait(20) and None)
        await run.crash([1])
        step = asyncio.create_task(run.step(6))
        for _ in range(500):
            if newcomer.admission.sessions:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not step.done()
        await crash(newcomer)
        gate.set()
        await step
        assert len(run.session.take_events()) == 2
        assert await run.finish() == expected


async def test_a_route_that_needs_a_survivor_to_take_more(expected: list[int]) -> None:
    """Only a peer of the route itself hosts what is missing."""
    async with local_swarm(tiny_llama(), [range(0, 4), range(2, 4)], exact=True) as pair:
        whole, half = (peer.identity.peer_id for peer in pair.peers)
        async with pair.connect(exact=True) as client:
            for _ in range(100):
                if len(await client.connection.known.look()) == 2:
                    break
                await asyncio.sleep(0.1)
            client.connection.known.rtt_s.update({whole: 0.0, half: -1.0})
            async with await client.open_session(256) as session:
                run = Disturbed(pair, session, expected)
                assert len(session.route) == 2
                await run.prefill()
                await run.step(6)
                await run.crash([1])
                assert await run.finish() == expected
                assert [stop.peer.peer_id for stop in session.route] == [whole]


async def test_without_another_host_the_reason_and_the_text_so_far(bare: LocalSwarm) -> None:
    """Which blocks are missing, `wait_s` seconds for them, and then the end."""
    async with bare.connect(exact=True) as client:
        client.connection.defaults = replace(client.connection.defaults, wait_s=1.5)
        said: list[int] = []
        started = 0.0

        async def listen() -> None:
            nonlocal started
            async for piece in client.stream(PROMPT, max_new_tokens=TOKENS, eos_token_id=-1):
                said.extend(piece.ids)
                if len(said) >= 5 and not started:
                    await bare.peers[1]._grpc.stop(None)
                    started = time.monotonic()

        with pytest.raises(NoRoute, match=r"nobody who can be reached hosts blocks 1-2 any more; waited 1\.5 s"):
            await listen()
        assert len(said) >= 5
        assert 1.5 <= time.monotonic() - started < 6
    await crash(bare.peers[1])  # it is back


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_the_only_host_comes_back(bare: LocalSwarm, expected: list[int], place: int) -> None:
    """Its connections broke, nobody else hosts its blocks, and it answers again at once."""
    async with disturbed(bare, expected) as run:
        await run.prefill()
        await run.step(6)
        await run.crash([place])
        assert await run.finish() == expected


# Negative controls: the tokens above are those of an undisturbed run because of what is replayed.


async def test_an_altered_activation_changes_the_tokens(
    swarm: LocalSwarm, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter(rows: bytearray) -> bytearray:
        row = np.frombuffer(rows, np.float32, count=64, offset=256 * 65).copy()
        rows[256 * 65 : 256 * 66] = (row[::-1] * 2).tobytes()
        return rows

    assert await replayed(swarm, expected, monkeypatch, lambda rows: rows) == expected
    assert await replayed(swarm, expected, monkeypatch, alter) != expected


async def test_a_missing_row_is_noticed(
    swarm: LocalSwarm, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PeerError, match="before the 1 rows that are still to be replayed"):
        await replayed(swarm, expected, monkeypatch, lambda rows: rows[:-256])


# Leaving on purpose.


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_sessions_move_away_from_a_peer_that_drains(swarm: LocalSwarm, expected: list[int], place: int) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        [leaving] = run.peers([place])
        async with draining(leaving) as drained:
            while not (events := run.session.take_events()):
                await run.step(0)
                await asyncio.sleep(0.01)
            await asyncio.wait_for(drained, 5)
            [event] = events
            assert "is leaving" in event.fault
            assert leaving.identity.peer_id not in {stop.peer.peer_id for stop in run.session.route}
            assert await run.finish() == expected


async def test_without_another_host_a_peer_that_drains_finishes_first(bare: LocalSwarm, expected: list[int]) -> None:
    async with AsyncExitStack() as stack:
        async with disturbed(bare, expected) as run:
            await run.prefill()
            drained = await stack.enter_async_context(draining(bare.peers[1]))
            assert await run.finish() == expected
            assert not drained.done()
            assert not run.session.take_events()
        await asyncio.wait_for(drained, 5)


async def test_a_peer_that_drains_ends_idle_sessions_and_they_resume(
    swarm: LocalSwarm, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petal.peer.rpc.sessions.DRAIN_IDLE_S", 0.2)
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(4)
        async with draining(run.peers([1])[0]) as drained:
            await asyncio.wait_for(drained, 5)
            assert await run.finish() == expected


async def test_a_session_stays_with_a_peer_that_drains_where_the_others_are_full(
    swarm: LocalSwarm, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disturbed(swarm, expected) as run:
        await run.prefill()
        [leaving] = run.peers([1])
        [other] = [peer for peer in swarm.peers if peer.blocks == SPANS[1] and peer is not leaving]
        monkeypatch.setattr(other.admission, "max_sessions", 0)
        # As its next record will say.
        monkeypatch.setattr(
            "petal.client.session.failover.is_full", lambda record, _: record.peer_id == other.identity.peer_id
        )
        async with draining(leaving) as drained:
            await asyncio.sleep(0.1)
            assert await run.finish() == expected
            assert not drained.done()
            assert not run.session.take_events()


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_a_peer_vanishes_between_drafted_rounds(swarm: LocalSwarm, expected: list[int], place: int) -> None:
    """The drafters and their overlap go on as if nothing had happened."""
    drafters = [NgramDrafter(), tiny_drafter(0).fresh()]
    sampling = {name: value for name, value in vars(PARAMS).items() if name != "sequence"}
    async with swarm.connect(exact=True) as client, await client.open_session(256) as session:
        run = Disturbed(swarm, session, expected)
        config = GenerationConfig(drafter=drafters, budget=8, max_new_tokens=TOKENS, eos_token_id=-1, **sampling)
        pieces = []
        async for piece in await client.generator.chunks(session, PROMPT, config):
            pieces.append(piece)
            if len(pieces) == 3:
                await run.crash([place])
    assert [token for piece in pieces for token in piece.ids] == expected
    assert len(pieces) < TOKENS, "nothing was drafted"
    assert sum(len(piece.events) for piece in pieces) == 1
