"""Daemons of the DHT die and freeze; peers, records and routes do not depend on any of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from petal.peer.server import PeerServer
from petal.protocol.directory import dht

from ..support.swarms import LocalSwarm, local_swarm, spans
from ..support.tiny import tiny_llama

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.waits]
PROMPT = [1, 5, 9, 4, 77, 30, 31, 32]
SOON_S = 40.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Three peers; the first is everybody's way into the DHT."""
    async with local_swarm(tiny_llama(), spans(4, 3)) as running:
        await hear_of_each_other(running, 0)
        yield running


def pid_of(peer: PeerServer) -> int:
    return getattr(peer.directory, "_dht", peer.directory)._p2p._child.pid


def strike(peer: PeerServer, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid_of(peer), number)


async def hear_of_each_other(swarm: LocalSwarm, since: float) -> None:
    """Every peer holds a record of every other that was made after `since`, in seconds of the epoch."""
    deadline = time.monotonic() + SOON_S
    while True:
        known = [sum(record.version > since * 1000 for record in peer.directory.book.list()) for peer in swarm.peers]
        if min(known) == len(swarm.peers):
            return
        assert time.monotonic() < deadline, f"of {len(swarm.peers)} peers each knows {known}"
        await asyncio.sleep(0.1)


async def dht_again(peers: Sequence[PeerServer]) -> None:
    """Their daemons are up, at the ports of before, and know each other."""
    deadline = time.monotonic() + SOON_S
    while not all(peer.directory._dht._node.protocol.routing_table.uid_to_peer_id for peer in peers):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def ports(swarm: LocalSwarm) -> list[str]:
    found = [await peer.directory.multiaddrs() for peer in swarm.peers]
    return [address.split("/tcp/")[1] for [address, *_] in found]


@pytest.mark.parametrize(
    "struck", [[0], [1], pytest.param([0, 1, 2], id="all")], ids=lambda places: "+".join(map(str, places))
)
async def test_the_death_of_daemons_changes_nothing(swarm: LocalSwarm, struck: list[int]) -> None:
    before = await ports(swarm)
    async with swarm.connect() as client:
        said: list[int] = []
        async for piece in client.stream(PROMPT, max_new_tokens=8, drafter="none"):
            if not said:
                for place in struck:
                    strike(swarm.peers[place], signal.SIGKILL)
            said += piece.ids
        await hear_of_each_other(swarm, time.time())
        await dht_again(swarm.peers)
        assert await ports(swarm) == before, "it is where the others look for it"
    async with swarm.connect() as newcomer:
        pieces = newcomer.stream(PROMPT, max_new_tokens=8, drafter="none")
        assert [token async for piece in pieces for token in piece.ids] == said


async def test_frozen_daemons_are_ended_and_meanwhile_records_go_round(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht, "ANSWER_S", 1.0)
    monkeypatch.setattr(dht, "DAEMON_ANSWER_S", 1.0)
    frozen = [pid_of(peer) for peer in swarm.peers]
    for peer in swarm.peers:
        strike(peer, signal.SIGSTOP)
    await hear_of_each_other(swarm, time.time())
    await dht_again(swarm.peers)
    deadline = time.monotonic() + SOON_S
    while set(frozen) & {pid_of(peer) for peer in swarm.peers}:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
