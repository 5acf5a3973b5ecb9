"""Generations in which peers of this process crash or leave, for tests that compare them with undisturbed ones."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from petal.peer.server import PeerServer
from petal.peer.session.replay import ReplayLog
from petal.protocol import petal_pb2 as pb
from petal.protocol.petal_pb2_grpc import add_DirectoryServicer_to_server, add_PeerServicer_to_server
from petal.protocol.trust.interceptor import TrustInterceptor
from petal.protocol.wire.limits import SERVER_OPTIONS
from petal.protocol.wire.sampling import SamplingParams

from .random_drafter import RandomDrafter
from .swarms import LocalSwarm
from .tiny import VOCAB
from .trees import token_chain

PARAMS = SamplingParams(
    temperature=0.9, top_p=0.95, seed=7, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1
)
PROMPT = random.Random(0).choices(range(VOCAB), k=70)
TOKENS = 40
SPANS = [range(0, 1), range(1, 3), range(3, 4)]


async def undisturbed(client: AsyncSwarmModel) -> list[int]:
    ids = await client.generate(
        PROMPT,
        max_new_tokens=TOKENS,
        eos_token_id=-1,
        temperature=PARAMS.temperature,
        top_p=PARAMS.top_p,
        seed=PARAMS.seed,
        repetition_penalty=PARAMS.repetition_penalty,
        presence_penalty=PARAMS.presence_penalty,
        frequency_penalty=PARAMS.frequency_penalty,
    )
    return ids[len(PROMPT) :]


async def crash(peer: PeerServer) -> None:
    """Every connection breaks and every session is gone; then the peer is back at the same address."""
    await peer._grpc.stop(None)
    peer._grpc = grpc.aio.server(interceptors=[TrustInterceptor(peer.trust)], options=SERVER_OPTIONS)
    assert peer._ports.bind(peer._grpc, peer.trust.server_credentials()) == peer.port  # where it listened last
    add_PeerServicer_to_server(peer.service, peer._grpc)
    add_DirectoryServicer_to_server(peer.announcement.service(), peer._grpc)
    await peer._grpc.start()


class Disturbed:
    """One generation with random trees in which peers crash."""

    def __init__(self, swarm: LocalSwarm, session: Session, expected: Sequence[int], seed: int = 0) -> None:
        self.swarm = swarm
        self.session = session
        self.drafter = RandomDrafter.knowing([*PROMPT, *expected], VOCAB, seed)
        self.said: list[int] = []

    def peers(self, places: Sequence[int]) -> list[PeerServer]:
        ids = [self.session.route[place].peer.peer_id for place in places]
        return [peer for peer in self.swarm.peers if peer.identity.peer_id in ids]

    async def crash(self, places: Sequence[int]) -> None:
        await asyncio.gather(*(crash(peer) for peer in self.peers(places)))

    @asynccontextmanager
    async def held(self, place: int) -> AsyncIterator[None]:
        """Meanwhile the peer at that place computes nothing."""
        gate = threading.Event()
        [peer] = self.peers([place])
        peer.engine.call(lambda: gate.wait(20) and None)
        try:
            yield
        finally:
            gate.set()

    async def prefill(self, chunk: int = 8) -> None:
        self.said = [(await self.session.prefill(PROMPT, PARAMS, chunk=chunk)).next_token]

    async def step(self, budget: int) -> None:
        tree = self.drafter.propose([*PROMPT, *self.said], budget)
        result = await self.session.step(tree)
        self.said += [*result.path_ids, result.next_token]

    async def finish(self, budget: int = 6) -> list[int]:
        while len(self.said) < TOKENS:
            await self.step(budget)
        return self.said[:TOKENS]


@asynccontextmanager
async def disturbed(swarm: LocalSwarm, expected: Sequence[int]) -> AsyncIterator[Disturbed]:
    async with swarm.connect(exact=True) as client, await client.open_session(256) as session:
        assert len(session.route) == 3
        yield Disturbed(swarm, session, expected)


async def plain_steps(session: Session, token: int, count: int) -> list[int]:
    """`count` tokens from `token` on, it included, one a step."""
    said = [token]
    while len(said) < count:
        said.append((await session.step(token_chain(said[-1:]))).next_token)
    return said


@asynccontextmanager
async def draining(peer: PeerServer) -> AsyncIterator[asyncio.Task[None]]:
    """The peer drains; afterwards it has thought better of it."""
    task = asyncio.create_task(peer.drain(20))
    await asyncio.sleep(0)
    assert peer.service.sessions.draining
    try:
        yield task
    finally:
        task.cancel()
        peer.service.sessions.draining = False
        peer.announcement.state = pb.ONLINE
        await peer.announcement.publish()


async def replayed(
    swarm: LocalSwarm, expected: list[int], monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], bytearray]
) -> list[int]:
    """A run in which the middle peer crashes and the head's log says something else."""

    def altered(log: ReplayLog) -> tuple[bytes, ...]:
        return (bytes(change(bytearray(b"".join(log._chunks)))),)

    async with disturbed(swarm, expected) as run:
        await run.prefill()
        await run.step(6)
        await run.crash([1])
        monkeypatch.setattr(ReplayLog, "chunks", property(altered))
        return await run.finish()
