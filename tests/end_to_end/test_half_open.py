"""Connections that never become calls, streams that say nothing, clients that read nothing: all of them end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from petal.peer.limits import answers
from petal.peer.rpc import sessions, streams
from petal.peer.session import outputs
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import HEADER_BYTES, KEEPALIVE_S, MAX_STREAMS, SERVER_OPTIONS, SILENT_S

from ..support.half_open import HALF_A_HELLO, PREFACE, SETTINGS, settings_of, until_closed
from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import VOCAB, tiny_llama
from ..support.wire import RawSession, Wire, released

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.waits]
Code = grpc.StatusCode
# Of a machine that is busy with other things.
LATE_S = 4.0
# Rows of logits, half a megabyte an answer; enough of them to fill whatever buffers there are.
ROWS, ANSWERS = 500, 60


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    async with local_swarm(tiny_llama(), [range(0, 4)]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def wire(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with Wire(swarm.peers[0]) as wire:
        yield wire


async def test_half_open_connections_are_closed(wire: Wire) -> None:
    kinds = [(b"", False), (HALF_A_HELLO, False), (b"", True), (PREFACE[:10], True)]
    waits = (until_closed(wire.peer.address, said, tls, SILENT_S + LATE_S) for said, tls in kinds)
    assert max(await asyncio.gather(*waits)) < SILENT_S + LATE_S


async def test_who_answers_no_ping_is_gone(wire: Wire) -> None:
    said = PREFACE + SETTINGS
    seconds = await until_closed(wire.peer.address, said, True, KEEPALIVE_S + LATE_S)
    assert KEEPALIVE_S / 2 < seconds < KEEPALIVE_S + LATE_S


async def test_who_answers_pings_may_be_silent_for_as_long_as_it_wants(wire: Wire) -> None:
    """The negative control: an idle gRPC connection outlives both limits."""
    await wire.channel.channel_ready()
    await asyncio.sleep(KEEPALIVE_S + LATE_S)
    assert wire.channel.get_state() == grpc.ChannelConnectivity.READY


@pytest.mark.parametrize("kind", ["session", "link"])
async def test_a_stream_that_says_nothing_ends(wire: Wire, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SILENT_S", 0.3)
    stream = wire.stream() if kind == "session" else wire.link()
    await stream.call.wait_for_connection()
    await stream.refused(Code.DEADLINE_EXCEEDED, "nothing came within 0.3 s")


async def asking_much(wire: Wire) -> RawSession:
    """A session that has asked for one answer again and again, far more than buffers hold, and has read one."""
    session, _ = await wire.session(reserve_tokens=512)
    for number in range(ANSWERS + 1):
        await session.step(1, [7] * ROWS, prefill=True, sample=True, want=pb.Want(logits=True))
        if number == 0:
            await session.result()
    return session


async def all_stall(wire: Wire) -> None:
    """Until nothing is taken any more of what waits for anybody."""
    running = wire.peer.service.sessions._running
    while any(s.owed.size and s.owed.stalled_s < answers.STALLED_S for s in running.values()):  # noqa: ASYNC110 (no event)
        await asyncio.sleep(0.02)


async def test_who_reads_nothing_is_cut_and_its_pages_are_free(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "UNREAD_S", 1.0)
    session = await asking_much(wire)
    assert wire.peer.admission.sessions == 1
    await released(wire.peer)
    await session.refused(Code.DEADLINE_EXCEEDED, "nothing was read for 1 s")
    neighbour, token = await wire.prefilled([1, 5, 9])
    assert 0 <= token < VOCAB, "others are served"
    neighbour.close()


async def test_who_reads_slowly_is_not_cut(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: it takes much longer than the limit, but reads on."""
    monkeypatch.setattr(streams, "UNREAD_S", 1.0)
    session = await asking_much(wire)
    for _ in range(ANSWERS):
        assert len((await session.result()).logits) == 4 * ROWS * VOCAB
        await asyncio.sleep(0.05)
    session.close()


async def test_all_that_nobody_reads_is_bounded_and_who_reads_is_served(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three that stall fill what all sessions may hold together, none of them its own bound."""
    monkeypatch.setattr(answers, "STALLED_S", 0.3)
    reader, _ = await wire.session(reserve_tokens=512)
    await reader.step(1, [7] * ROWS, prefill=True, sample=True, want=pb.Want(logits=True))
    alone = await reader.result()
    monkeypatch.setattr(sessions, "ALL_ANSWER_BYTES", 24 << 20)
    stalling = []
    for _ in range(3):
        stalling.append(await asking_much(wire))
        await all_stall(wire)
    await reader.step(2, [7] * ROWS, rewind=0, prefill=True, sample=True, want=pb.Want(logits=True))
    again = await reader.result()
    assert (again.logits, again.next_token) == (alone.logits, alone.next_token)
    left = wire.peer.service.sessions._running.values()
    assert sum(session.owed.size for session in left) <= 24 << 20
    assert 1 <= len(left) < 4
    await stalling[0].refused(Code.RESOURCE_EXHAUSTED, "answers that nobody has read fill this peer's memory")
    wire.close_streams()
    await released(wire.peer)


async def test_a_large_answer_is_not_kept_for_a_repeat(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_KEPT", 1)
    session, _ = await wire.session(reserve_tokens=512)
    step = {"ids": [7] * ROWS, "prefill": True, "sample": True, "want": pb.Want(logits=True)}
    await session.step(1, **step)
    await session.result()
    await session.step(1, **step)
    await session.refused(Code.FAILED_PRECONDITION, "the answer to step 1 is not kept")


async def test_a_stranger_hears_of_tight_bounds_before_it_says_anything(wire: Wire) -> None:
    """No table of headers that could be filled once and named a thousand times, few streams, small headers."""
    said = await settings_of(wire.peer.address)
    assert (said[1], said[3], said[6]) == (0, MAX_STREAMS, HEADER_BYTES)


async def test_a_connection_without_a_call_is_closed() -> None:
    """A server with our options, but for an idle limit that a test can wait for."""
    options = dict(SERVER_OPTIONS)
    assert options["grpc.max_connection_idle_ms"] == 60_000
    trust = PublicTrust(Identity.ephemeral())
    server = grpc.aio.server(options=[*(options | {"grpc.max_connection_idle_ms": 300}).items()])
    port = server.add_secure_port("127.0.0.1:0", trust.server_credentials())
    await server.start()
    assert await until_closed(f"127.0.0.1:{port}", PREFACE + SETTINGS, True, KEEPALIVE_S) < KEEPALIVE_S / 2
    await server.stop(None)
