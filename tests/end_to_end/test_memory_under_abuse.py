"""What a peer's process takes while strangers do their worst, and that it gives it back once they are gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.trust import PublicTrust

from ..chaos.peer_process import PeerProcess
from ..support.http2 import (
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    PING_CALL,
    SESSION,
    WINDOW_UPDATE,
    Http2,
    call,
    frame,
    literal,
    reference,
)
from ..support.tiny import tiny_llama
from ..support.wire import ListedPeer, Wire

pytestmark = pytest.mark.full
# Logits of a step that asks for as much as it may: 600 rows, 118 MB.
VOCAB, ROWS = 49_152, 600
ABUSERS, FLOODERS, FLOOD_S, CALM_S = 12, 4, 10.0, 60.0
MIB = 1 << 20


class Memory:
    """Of one process, in MiB beyond what it had before."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._process.memory_info().rss
        self.peak = 0.0

    @property
    def now(self) -> float:
        return (self._process.memory_info().rss - self._before) / MIB

    async def watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now)
            await asyncio.sleep(0.02)

    async def falls_to(self, mib: float) -> float:
        """Where it is once it has fallen so far, or it has had time enough."""
        deadline = time.monotonic() + CALM_S
        while self.now > mib and time.monotonic() < deadline:  # noqa: ASYNC110 (another process's memory)
            await asyncio.sleep(0.2)
        return self.now


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_llama(vocab_size=VOCAB, context=2048))


@asynccontextmanager
async def under_attack(model: str, folder: Path) -> AsyncIterator[tuple[ListedPeer, Memory]]:
    """A peer in a process of its own; afterwards it still serves."""
    process = PeerProcess(model, range(0, 4), folder, 0)
    await process.start([])
    try:
        peer = await ListedPeer.at(process.announced)
        async with Wire(peer) as wire:
            alone = (await wire.prefilled([1, 5, 9]))[1]
        memory = Memory(process.pid)
        watching = asyncio.create_task(memory.watch())
        yield peer, memory
        watching.cancel()
        async with Wire(peer) as wire:
            assert (await wire.prefilled([1, 5, 9]))[1] == alone
    finally:
        process.destroy()


async def never_read(peer: ListedPeer) -> None:
    """Ask for logits three times, read none, and leave after a while."""
    caller = PublicTrust()
    async with Wire(peer) as wire:
        session = wire.stream()
        try:
            await session.open(**wire.opening(caller, reserve_tokens=ROWS))
            for number in (1, 2, 3):
                want = {"prefill": True, "sample": True, "want": pb.Want(logits=True)}
                await session.step(number, [7] * ROWS, rewind=None if number == 1 else 0, **want)
                await asyncio.sleep(2)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        await asyncio.sleep(8)


async def test_answers_that_nobody_reads(model: str, tmp_path: Path) -> None:
    """12 sessions; this took 3.4 GiB, and 2.7 stayed."""
    async with under_attack(model, tmp_path) as (peer, memory):
        await asyncio.gather(*(never_read(peer) for _ in range(ABUSERS)))
        left = await memory.falls_to(100)
        print(f"unread answers: {memory.peak:.0f} MiB at most, {left:.0f} stay")
        assert 100 < memory.peak < 1200
        assert left <= 100


async def header_bomb(address: str) -> None:
    """One entry of 4 kB, named 8,000 times in each of a hundred calls."""
    connection = await Http2.dial(address)
    for number in range(100):
        block = (
            call(PING_CALL) + (literal("x", "y" * 4000, indexed=True) if number == 0 else b"") + reference(62) * 8000
        )
        stream, parts = connection.next_stream(), [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
        kinds = [HEADERS] + [CONTINUATION] * (len(parts) - 1)
        frames = [frame(kind, 0, stream, part) for kind, part in zip(kinds[:-1], parts[:-1], strict=True)]
        await connection.send(*frames, frame(kinds[-1], END_HEADERS, stream, parts[-1]))
    await asyncio.sleep(2)
    connection.close()


async def test_header_bombs(model: str, tmp_path: Path) -> None:
    """Before a connection has agreed to have no table, gRPC reads what names an entry of the usual one."""
    async with under_attack(model, tmp_path) as (peer, memory):
        await asyncio.gather(*(header_bomb(peer.address) for _ in range(FLOODERS)))
        left = await memory.falls_to(100)
        print(f"header bombs: {memory.peak:.0f} MiB at most, {left:.0f} stay")
        assert 100 < memory.peak < 1000
        assert left <= 100


async def window_flood(address: str) -> int:
    """A hundred streams whose windows open byte by byte, as fast as bytes go; returns the bytes sent."""
    connection = await Http2.dial(address)
    streams = [connection.next_stream() for _ in range(100)]
    await connection.send(*(frame(HEADERS, END_HEADERS, stream, call(SESSION)) for stream in streams))
    update = (1).to_bytes(4, "big")
    sent = await connection.flood(b"".join(frame(WINDOW_UPDATE, 0, stream, update) for stream in streams) * 50, FLOOD_S)
    connection.close()
    return sent


async def test_window_update_floods(model: str, tmp_path: Path) -> None:
    async with under_attack(model, tmp_path) as (peer, memory):
        sent = sum(await asyncio.gather(*(window_flood(peer.address) for _ in range(FLOODERS))))
        left = await memory.falls_to(100)
        print(f"window updates: {sent // MIB} MiB sent, {memory.peak:.0f} MiB at most, {left:.0f} stay")
        assert sent > 100 * MIB, "no flood"
        assert memory.peak < 800
        assert left <= 100
