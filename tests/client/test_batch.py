"""Many answers at a time: as many as fit run, and where one fails none goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from petal.client.batch import Batch, shared_prefix
from petal.client.config import GenerationConfig
from petal.client.output import OutputChunk
from petal.client.routing.route import sessions_that_fit
from petal.client.session.peer_error import PeerError
from petal.protocol import petal_pb2 as pb

BUSY = PeerError("A", grpc.StatusCode.RESOURCE_EXHAUSTED, "343 cache tokens asked, 192 free", "A")


class Session:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self.prefilled: list[int] = []

    async def prefill(self, ids: list[int]) -> None:
        self.prefilled = ids

    async def fork(self) -> Session:
        self._swarm.forks += 1
        return await self._swarm.open_session(0)

    def close(self) -> None:
        self._swarm.open.discard(self)


class Swarm:
    """A generator whose peers hold `room` sessions, though their records may say `fit`."""

    def __init__(self, room: int, fit: int | None = None) -> None:
        self.connection = self
        self.room, self.fit = room, room if fit is None else fit
        self.open: set[Session] = set()
        self.most = self.refused = self.forks = 0
        self.said: list[int] = []
        self.fails: int | None = None
        self.error: Exception = RuntimeError("this one fails")

    async def sessions_that_fit(self, _: int) -> int:
        return self.fit

    async def open_session(self, *_: object) -> Session:
        await asyncio.sleep(0)
        if len(self.open) >= self.room:
            self.refused += 1
            raise BUSY
        session = Session(self)
        self.open.add(session)
        self.most = max(self.most, len(self.open))
        return session

    async def chunks(self, session: Session, ids: list[int], config: GenerationConfig) -> AsyncIterator[OutputChunk]:
        async def said() -> AsyncIterator[OutputChunk]:
            for _ in range(3):
                await asyncio.sleep(0.001)
                if ids[-1] == self.fails:
                    raise self.error
            self.said.append(ids[-1])
            yield OutputChunk([ids[-1], config.sequence])

        return said()


async def said(swarm: Swarm, prompts: list[list[int]], n: int = 1, **options: Any) -> list[list[list[int]]]:
    config = GenerationConfig(num_return_sequences=n)
    found: Any = await Batch(swarm, config, **options).answers(prompts)  # type: ignore[arg-type]
    return [[[token for chunk in chunks for token in chunk.ids] for chunks in group] for group in found]


async def test_as_many_as_fit_run_and_the_rest_wait() -> None:
    swarm = Swarm(room=5)
    prompts = [[i, i] for i in range(100)]
    assert await said(swarm, prompts) == [[[i, 0]] for i in range(100)]
    assert (swarm.most, swarm.refused, len(swarm.open)) == (5, 0, 0)


async def test_records_that_promise_too_much_cost_tries_and_no_answer() -> None:
    swarm = Swarm(room=2, fit=10)
    assert len(await said(swarm, [[i, i] for i in range(20)])) == 20
    assert swarm.most == 2
    assert swarm.refused


async def test_where_nobody_has_room_it_is_said() -> None:
    with pytest.raises(PeerError, match="192 free"):
        await said(Swarm(room=0), [[1, 1], [2, 2]])


async def test_where_one_fails_no_session_stays() -> None:
    swarm = Swarm(room=4)
    swarm.fails = 2
    with pytest.raises(RuntimeError, match="this one fails"):
        await said(swarm, [[i, i] for i in range(50)])
    assert not swarm.open
    before = list(swarm.said)
    await asyncio.sleep(0.05)
    assert swarm.said == before
    assert len(before) < 10


async def test_where_one_fails_its_siblings_go_on_if_that_is_wanted() -> None:
    swarm = Swarm(room=4)
    swarm.fails, swarm.error = 2, PeerError("A", grpc.StatusCode.INTERNAL, "this one fails")
    prompts = [[i, i] for i in range(9)]
    found: Any = await Batch(swarm, GenerationConfig(), keep_errors=True).answers(prompts)  # type: ignore[arg-type]
    assert [group[0] is swarm.error for group in found] == [i == 2 for i in range(9)]
    assert sorted(swarm.said) == [0, 1, *range(3, 9)]
    assert not swarm.open
    # What nobody foresaw is no answer.
    swarm.error = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError, match="a fault of the program"):
        await Batch(swarm, GenerationConfig(), keep_errors=True).answers(prompts)  # type: ignore[arg-type]


async def test_progress_is_told() -> None:
    heard: list[tuple[int, int]] = []
    await said(Swarm(room=2), [[i, i] for i in range(3)], n=2, progress=lambda *done: heard.append(done))
    assert heard == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(("room", "forks"), [(1, 0), (2, 3), (8, 3)])
async def test_several_answers_share_their_prompt_where_there_is_room_for_it(room: int, forks: int) -> None:
    swarm = Swarm(room)
    assert await said(swarm, [[7, 7, 7]], n=3) == [[[7, 0], [7, 1], [7, 2]]]
    assert swarm.forks == forks
    assert swarm.most <= room
    assert not swarm.open


def test_what_prompts_share() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 5]]) == [1, 2]
    assert shared_prefix([[1, 2], [1, 2]]) == [1]


def test_what_fits_is_what_every_block_has_room_for() -> None:
    def peer(start: int, end: int, free: int, sessions: int = 0, state: pb.PeerState = pb.ONLINE) -> pb.PeerRecord:
        return pb.PeerRecord(
            start=start, end=end, n_blocks=4, cache_tokens_free=free, sessions=sessions, max_sessions=6, state=state,
            addresses=["a"],
        )  # fmt: skip

    assert sessions_that_fit([peer(0, 4, 1000)], 100) == 6
    assert sessions_that_fit([peer(0, 4, 390)], 100) == 3
    assert sessions_that_fit([peer(0, 4, 1000, sessions=4)], 100) == 2
    assert sessions_that_fit([peer(0, 2, 1000), peer(2, 4, 250)], 100) == 2
    assert sessions_that_fit([peer(0, 2, 1000), peer(2, 4, 250), peer(2, 4, 250)], 100) == 4
    assert sessions_that_fit([peer(0, 2, 1000)], 100) == 0
    assert sessions_that_fit([peer(0, 4, 1000, state=pb.DRAINING)], 100) == 0
