"""Peers fail in mid-session, at every place and every moment; the tokens stay those of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
import pytest_asyncio
import torch
from petal.client.route import NoRoute
from petal.client.session import Session
from petal.client.stream import PeerError
from petal.client.swarm import AsyncSwarmModel
from petal.kernels import native
from petal.peer.replay import ReplayLog
from petal.peer.server import PeerServer
from petal.protocol.directory import DirectoryService
from petal.protocol.limits import SERVER_OPTIONS
from petal.protocol.petal_pb2_grpc import add_DirectoryServicer_to_server, add_PeerServicer_to_server
from petal.protocol.sampling import SamplingParams

from .swarms import LocalSwarm, local_swarm
from .test_exactness import RandomDrafter
from .tiny import VOCAB, tiny_llama
from .wire import settled

pytestmark = pytest.mark.asyncio(loop_scope="module")
PARAMS = SamplingParams(
    temperature=0.9, top_p=0.95, seed=7, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1
)
PROMPT = random.Random(0).choices(range(VOCAB), k=70)
TOKENS = 40
SPANS = [range(0, 1), range(1, 3), range(3, 4)]


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    native.set_threads(None)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Two peers for each of three spans."""
    async with local_swarm(tiny_llama(), [*SPANS, *SPANS], exact=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def expected(swarm: LocalSwarm) -> list[int]:
    async with swarm.connect(exact=True) as client:
        return await undisturbed(client)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_leaks(swarm: LocalSwarm) -> AsyncIterator[None]:
    yield
    for peer in swarm.peers:
        for _ in range(1000):
            if not peer.admission.sessions:
                break
            await asyncio.sleep(0.005)
        await settled(peer)
        assert peer.admission.sessions == 0
        assert peer.engine.pool.free_pages == peer.engine.pool.n_pages
        assert peer.service.replay_budget.used == 0


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
    peer._grpc = grpc.aio.server(options=SERVER_OPTIONS)
    peer._grpc.add_insecure_port(peer.address)
    add_PeerServicer_to_server(peer.service, peer._grpc)
    directory = DirectoryService(peer.identity.peer_id, state=lambda: peer._state, records=peer.dht.book.signed)
    add_DirectoryServicer_to_server(directory, peer._grpc)
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


PLACES = pytest.mark.parametrize(
    "places",
    [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]],
    ids=["head", "middle", "tail", "head+middle", "middle+tail", "head+tail", "all"],
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
@pytest.mark.parametrize("waiting_for", [0, 1, 2], ids=["at-head", "at-middle", "at-tail"])
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
