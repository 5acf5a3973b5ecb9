"""What a client says of its sessions' priority takes nothing from others, unless the peer granted it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from petal.peer.limits.quotas import NO_QUOTAS, Quota, Quotas, Rule
from petal.peer.server import PeerServer
from petal.protocol.trust.trust import PublicTrust

from ..support.swarms import local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import CALLER, RawSession, Wire

TOP = 2**31 - 1
GRANTED = Quotas((Rule(Quota(priority=TOP)),))
PROMPT = [i % 250 + 3 for i in range(400)]
# Prompts of the greedy client, several iterations' worth of work.
GREEDY = 12


async def _queued(peer: PeerServer, commands: int) -> None:
    """Wait until so many commands wait for the compute thread, which is held."""
    for _ in range(4000):
        if peer.engine._commands.qsize() >= commands:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the steps did not arrive")


async def _begin(wire: Wire, caller: PublicTrust, priority: int) -> RawSession:
    session = wire.stream()
    await session.open(**wire.opening(caller, priority=priority, reserve_tokens=len(PROMPT)))
    await session.step(1, PROMPT, prefill=True, sample=True, trace=True)
    return session


async def _start_ns(session: RawSession) -> int:
    return (await session.result()).hops[0].start_ns


@pytest.mark.parametrize(("quotas", "starved"), [(NO_QUOTAS, False), (GRANTED, True)], ids=["nobody's", "granted"])
async def test_priority_over_the_wire(quotas: Quotas, starved: bool) -> None:
    """Twelve prompts of the highest priority came first. Without a grant, the honest one waits for one turn only."""
    other = PublicTrust()
    async with local_swarm(tiny_llama(), [range(4)], quotas=quotas) as swarm:
        [peer] = swarm.peers
        held = threading.Event()
        async with Wire(peer) as wire:
            peer.engine.call(lambda: held.wait(30))
            try:
                greedy = [await _begin(wire, other, TOP) for _ in range(GREEDY)]
                honest = await _begin(wire, CALLER, 0)
                await _queued(peer, 2 * (GREEDY + 1))
            finally:
                held.set()
            mine, *others = await asyncio.gather(_start_ns(honest), *map(_start_ns, greedy))
            before = sum(other <= mine for other in others)
            assert before == GREEDY if starved else before <= GREEDY // 2
