"""Who opens streams or connections without end is refused and hung up on; everybody else is served meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from petal.client.swarm import AsyncSwarmModel
from petal.peer.limits.rates import CallRates, Rate
from petal.protocol import petal_pb2 as pb
from petal.protocol.petal_pb2_grpc import DirectoryStub

from ..chaos.peer_process import PeerProcess
from ..support.http2 import DATA, END_HEADERS, HEADERS, RST_STREAM, SESSION, Http2, call, frame
from ..support.swarms import NO_RATES as WITHOUT
from ..support.swarms import local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import ListedPeer, Wire

PROMPT = [1, 5, 9, 4, 77]
CONNECTIONS, STREAMS_PER_S, FLOOD_S = 4, 300, 6.0
IDLE, FILES = 200, 220
TIGHT = CallRates(connection=Rate(5, 20), few=20, patience=10)
Code = grpc.StatusCode


async def said_to_pings(wire: Wire, count: int) -> list[Code]:
    stub = DirectoryStub(wire.channel)

    async def ping() -> Code:
        try:
            await stub.Ping(pb.PingRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return Code.OK

    return await asyncio.gather(*(ping() for _ in range(count)))


async def test_calls_beyond_the_rate_are_refused_and_who_goes_on_is_hung_up_on() -> None:
    async with local_swarm(tiny_llama(), [range(0, 4)], rates=TIGHT) as swarm:
        async with Wire(swarm.peers[0]) as honest, Wire(swarm.peers[0]) as flooding:
            session, token = await honest.prefilled(PROMPT)
            codes = await said_to_pings(flooding, 100)
            assert 20 <= codes.count(Code.OK) < 30
            assert codes.count(Code.RESOURCE_EXHAUSTED) >= 5
            assert codes.count(Code.UNAVAILABLE) >= 20, "hung up on"
            await session.step(2, [token], base=len(PROMPT), sample=True)
            assert (await session.result()).sampled, "who is served already notices nothing"
            session.close()
        async with swarm.connect() as client:
            assert len(client.connection.known.reachable()) == 1, "others come in, from that very address"


async def test_without_a_limit_all_would_be_served() -> None:
    """The negative control."""
    async with local_swarm(tiny_llama(), [range(0, 4)], rates=WITHOUT) as swarm, Wire(swarm.peers[0]) as flooding:
        assert (await said_to_pings(flooding, 100)).count(Code.OK) == 100


async def test_an_identity_opens_sessions_no_faster_than_it_may() -> None:
    async with local_swarm(tiny_llama(), [range(0, 4)], rates=CallRates(identity=Rate(0.01, 3))) as swarm:
        for _ in range(3):
            async with Wire(swarm.peers[0]) as wire:
                await wire.session()
        async with Wire(swarm.peers[0]) as wire:
            stream = wire.stream()
            await stream.send(open=pb.Open(**wire.opening()))
            await stream.refused(Code.RESOURCE_EXHAUSTED, "you open sessions faster than this peer takes")


@asynccontextmanager
async def peer_process(folder: Path, **changed: Any) -> AsyncIterator[PeerProcess]:
    process = PeerProcess(str(tiny_llama()), range(0, 4), folder, 0, **changed)
    await process.start([])
    try:
        yield process
    finally:
        process.destroy()


async def flood(wire: Wire, until: float) -> int:
    """Sessions opened by hand and dropped, on a new connection whenever the peer hangs up; how many were tried."""
    tried = 0
    while time.monotonic() < until:
        with suppress(OSError):
            connection = await Http2.dial(wire.peer.address)
            streams: list[int] = []
            while time.monotonic() < until and not connection.closed:
                for _ in range(STREAMS_PER_S // 20):
                    opening = pb.ClientFrame(open=pb.Open(**wire.opening(reserve_tokens=16))).SerializeToString()
                    body = b"\0" + len(opening).to_bytes(4, "big") + opening
                    streams.append(connection.next_stream())
                    frames = [
                        frame(HEADERS, END_HEADERS, streams[-1], call(SESSION)),
                        frame(DATA, 0, streams[-1], body),
                    ]
                    if len(streams) > 20:
                        frames.append(frame(RST_STREAM, 0, streams.pop(0), (8).to_bytes(4, "big")))
                    await connection.send(*frames)
                    tried += 1
                await asyncio.sleep(0.05)
            connection.close()
    return tried


async def text(client: AsyncSwarmModel, tokens: int) -> list[int]:
    settings = {"max_new_tokens": tokens, "drafter": "none", "eos_token_id": -1}
    return [token async for piece in client.stream(PROMPT, **settings) for token in piece.ids]


async def under_flood(process: PeerProcess) -> tuple[list[float], float]:
    """Four connections flood a peer while a client generates, always the same text.

    Returns how many seconds a newcomer waited for what `status` shows, and the peer's processor time.
    """
    model, address = str(tiny_llama()), [process.announced]
    async with Wire(await ListedPeer.at(process.announced)) as wire:
        client = await AsyncSwarmModel.connect(model, address, wait_s=20)
        plain = await text(client, 100)
        peer, waits = psutil.Process(process.pid), []
        before, until = sum(peer.cpu_times()[:2]), time.monotonic() + FLOOD_S
        floods = [asyncio.create_task(flood(wire, until)) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.5)
        while time.monotonic() < until - 1:
            asked = time.monotonic()
            newcomer = await AsyncSwarmModel.connect(model, address, wait_s=20)
            waits.append(time.monotonic() - asked)
            await newcomer.close()
            assert await text(client, 100) == plain
        tried = sum(await asyncio.gather(*floods))
        assert tried > CONNECTIONS * STREAMS_PER_S, "no flood"
        spent = sum(peer.cpu_times()[:2]) - before
        await client.close()
    return waits, spent


@pytest.mark.full
async def test_a_flood_of_streams_changes_no_text_and_keeps_no_newcomer_waiting(tmp_path: Path) -> None:
    async with peer_process(tmp_path) as process:
        waits, spent = await under_flood(process)
    async with peer_process(tmp_path, rates=WITHOUT) as process:
        _, without = await under_flood(process)
    print(f"status within {max(waits):.2f} s; {spent:.1f} s of processor time, {without:.1f} without limits")
    assert max(waits) <= 1.0
    assert spent < 0.75 * without


async def idle_connections(address: str, count: int) -> list[Http2]:
    """Connections that say hello, answer pings, and want nothing; those that the peer took."""

    async def one() -> Http2 | None:
        try:
            return await asyncio.wait_for(Http2.dial(address), 10)
        except (OSError, asyncio.TimeoutError):
            return None

    return [connection for connection in await asyncio.gather(*(one() for _ in range(count))) if connection]


@pytest.mark.full
async def test_idle_connections_lock_nobody_out_where_files_are_few(tmp_path: Path) -> None:
    async with peer_process(tmp_path, files=FILES) as process:
        client = await AsyncSwarmModel.connect(str(tiny_llama()), [process.announced], wait_s=20)
        async with await client.open_session(128) as session:
            await session.prefill(PROMPT)
            idle = await idle_connections(process.announced, IDLE)
            plain = await text(client, 20)
            newcomer = await AsyncSwarmModel.connect(str(tiny_llama()), [process.announced], wait_s=20)
            assert await text(newcomer, 20) == plain
            await session.prefill(PROMPT)
            assert not session.take_events(), "a session outlives it all"
        await asyncio.sleep(1)
        files = psutil.Process(process.pid).num_fds()
        print(f"{len(idle)} idle connections, {files} files of {FILES}")
        assert files < FILES - 40
        for connection in idle:
            connection.close()
        await newcomer.close()
        await client.close()
