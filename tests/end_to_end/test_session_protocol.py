"""Sessions over real peers: however a state came about, it answers as a fresh session with the same tokens does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from petal.client.config import GenerationConfig
from petal.client.generation import generate
from petal.client.routing.route import NoRoute
from petal.client.session.peer_error import PeerError
from petal.client.session.result import OutputOptions, ResultReader
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.codec import decode
from petal.protocol.wire.limits import FRAME_BYTES
from petal.protocol.wire.sampling import SamplingParams
from petal.protocol.wire.tree import DraftTree

from ..support.swarms import LocalSwarm, local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama
from ..support.trees import token_chain
from ..support.wire import Wire, released, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, repetition_penalty=1.2, presence_penalty=0.3)
BOTH = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
PROMPT = [1, 5, 9, 4, 77, 30, 31, 32]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Three peers; blocks 0:1, 1:2 and 2:4."""
    async with local_swarm(tiny_llama(), spans(4, 3)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(swarm: LocalSwarm) -> AsyncIterator[AsyncSwarmModel]:
    async with swarm.connect() as connected:
        yield connected


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def single() -> AsyncIterator[LocalSwarm]:
    """One peer with the whole model, for raw frames."""
    async with local_swarm(tiny_llama(), [range(0, 4)]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_leaks(swarm: LocalSwarm) -> AsyncIterator[None]:
    yield
    for peer in swarm.peers:
        await released(peer)


async def start(session: Session, ids: Sequence[int], params: SamplingParams) -> int:
    token = (await session.prefill(ids, params)).next_token
    assert token is not None
    return token


async def go_on(session: Session, token: int, count: int) -> list[int]:
    """`count` tokens from `token` on, it included."""
    said = [token]
    while len(said) < count:
        said.append((await session.step(token_chain(said[-1:]))).next_token)
    return said


async def fresh(client: AsyncSwarmModel, ids: Sequence[int], params: SamplingParams, count: int = 6) -> list[int]:
    async with await client.open_session(256) as session:
        return await go_on(session, await start(session, ids, params), count)


# Rewind and fork.


@BOTH
async def test_rewind_and_continue_equals_a_fresh_session(client: AsyncSwarmModel, params: SamplingParams) -> None:
    async with await client.open_session(256) as session:
        await go_on(session, await start(session, PROMPT, params), 8)
        for length in (9, 4, 0):
            session.rewind(length)
            kept = list(session.ids)
            more = [60, 61, 62]
            said = await go_on(session, await start(session, more, params), 6)
            assert said == await fresh(client, kept + more, params)


async def test_rewind_past_the_session_is_refused_at_once(client: AsyncSwarmModel) -> None:
    async with await client.open_session(64) as session:
        await start(session, PROMPT, GREEDY)
        with pytest.raises(ValueError, match="cannot rewind to 9: the session holds 8 tokens"):
            session.rewind(9)


@BOTH
async def test_forks_go_separate_ways(client: AsyncSwarmModel, params: SamplingParams) -> None:
    async with await client.open_session(256) as parent:
        await start(parent, PROMPT, params)
        async with await parent.fork() as child:
            there, here = await asyncio.gather(start(parent, [40, 41], params), start(child, [50, 51], params))
            said = await asyncio.gather(go_on(parent, there, 6), go_on(child, here, 6))
        assert said[0] == await fresh(client, [*PROMPT, 40, 41], params)
        assert said[1] == await fresh(client, [*PROMPT, 50, 51], params)


@BOTH
async def test_fork_with_a_tree_pending(client: AsyncSwarmModel, params: SamplingParams) -> None:
    """The tree's rows are not committed when the session forks: each side commits for itself."""
    expected = await fresh(client, PROMPT, params, 8)
    async with await client.open_session(256) as parent:
        token = await start(parent, PROMPT, params)
        tree = DraftTree((token, 200, expected[1], expected[2]), (-1, 0, 0, 2))
        result = await parent.step(tree)
        assert result.accepted == [0, 2, 3]
        async with await parent.fork() as child:
            both = await asyncio.gather(go_on(parent, result.next_token, 5), go_on(child, result.next_token, 5))
    assert both == [expected[3:], expected[3:]]


async def test_fork_outlives_its_parent(client: AsyncSwarmModel) -> None:
    parent = await client.open_session(256)
    token = await start(parent, PROMPT, GREEDY)
    child = await parent.fork()
    parent.close()
    async with child:
        assert await go_on(child, token, 6) == await fresh(client, PROMPT, GREEDY)


async def test_forks_with_other_sequence_numbers_differ(client: AsyncSwarmModel) -> None:
    answers = await client.generate(
        PROMPT, num_return_sequences=3, max_new_tokens=8, temperature=1.5, seed=3, eos_token_id=-1
    )
    assert len({tuple(answer) for answer in answers}) == 3
    again = await client.generate(PROMPT, max_new_tokens=8, temperature=1.5, seed=3, eos_token_id=-1)
    assert again == answers[0]


# Prefixes.


async def answer(session: Session, prompt: list[int], **settings: Any) -> list[int]:
    config = GenerationConfig(**{"max_new_tokens": 6, "eos_token_id": -1, **settings})
    return [token async for piece in generate(session, prompt, config) for token in piece.ids]


class Counter:
    """Counts the rows that a session prefills."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        prefill = session.prefill

        async def counted(ids: Sequence[int], *rest: Any) -> Any:
            self.rows += len(ids)
            return await prefill(ids, *rest)

        monkeypatch.setattr(session, "prefill", counted)

    def take(self) -> int:
        rows, self.rows = self.rows, 0
        return rows


@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_growing_conversation_computes_only_what_is_new(
    client: AsyncSwarmModel, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    settings = {"temperature": temperature, "repetition_penalty": 1.3, "seed": 5}
    prompt = list(PROMPT)
    async with await client.open_session(256) as session:
        counter = Counter(session, monkeypatch)
        for turn in range(3):
            said = await answer(session, prompt, **settings)
            # All but the last token of an answer is cached; that one and three new ones follow.
            assert counter.take() == (len(PROMPT) if turn == 0 else 4)
            assert [*prompt, *said] == await client.generate(prompt, max_new_tokens=6, eos_token_id=-1, **settings)
            prompt = [*prompt, *said, 70 + turn, 71, 72]


async def test_regenerate_computes_one_row_and_answers_the_same(
    client: AsyncSwarmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await client.open_session(256) as session:
        counter = Counter(session, monkeypatch)
        first = await answer(session, PROMPT, temperature=1.0, seed=1)
        counter.take()
        assert await answer(session, PROMPT, temperature=1.0, seed=1) == first
        assert counter.take() == 1
        assert await answer(session, PROMPT, temperature=1.0, seed=2) != first


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64])
async def test_chunked_prefill_equals_whole_prefill(client: AsyncSwarmModel, chunk: int) -> None:
    ids = [(7 * i) % VOCAB for i in range(40)]
    async with await client.open_session(128) as session:
        result = await session.prefill(ids, SAMPLED, chunk=chunk)
        assert await go_on(session, result.next_token, 5) == await fresh(client, ids, SAMPLED, 5)


async def test_nothing_to_prefill_is_refused_at_once(client: AsyncSwarmModel) -> None:
    async with await client.open_session(64) as session:
        with pytest.raises(ValueError, match="nothing to prefill"):
            await session.prefill([], GREEDY)


# Repeats.


async def test_repeated_step_gets_the_stored_answer_and_the_session_goes_on(single: LocalSwarm) -> None:
    async with Wire(single.peers[0]) as wire:
        session, token = await wire.prefilled(PROMPT)
        tree = {"ids": [token, 3, 4], "parents": [-1, 0, 0], "base": len(PROMPT), "sample": True}
        tree["want"] = pb.Want(top_logprobs=3, logits=True)
        answers = []
        for _ in range(3):
            await session.step(2, **tree)
            answers.append(await session.result())
        assert answers[0] == answers[1] == answers[2]
        await session.raise_epoch(2)
        await session.step(2, **tree, route_epoch=2)
        assert await session.result() == answers[0]
        row = len(answers[0].accepted)
        await session.step(
            3, [answers[0].next_token], base=len(PROMPT) + row, commit=answers[0].accepted, sample=True, route_epoch=2
        )
        assert (await session.result()).sampled


async def test_repeat_travels_through_the_route(client: AsyncSwarmModel) -> None:
    async with await client.open_session(64) as session:
        token = await start(session, PROMPT, GREEDY)
        first = await session.step(token_chain([token]))
        message = pb.Step(step=2, route_epoch=1, base=len(PROMPT), ids=[token], sample=True, want=pb.Want())
        for hop in (session._pipeline.hops[0], session._pipeline.hops[-1]):
            await hop.send(pb.ClientFrame(step=message))
        reader = ResultReader(message, session.options.codec, hop.stop.peer)
        while (again := reader.add(await session._pipeline.result(10))) is None:
            pass
        assert (again.accepted, again.next_token) == (first.accepted, first.next_token)
        expected = await fresh(client, PROMPT, GREEDY)
        assert await go_on(session, first.next_token, 4) == expected[1:5]


# What the tail returns.


async def test_logits_agree_with_tokens_and_come_in_parts(client: AsyncSwarmModel) -> None:
    rows = FRAME_BYTES // (4 * VOCAB) // 2 - 20
    ids = [(11 * i) % VOCAB for i in range(rows)]
    async with await client.open_session(640) as session:
        result = await session.prefill(ids, GREEDY, OutputOptions(logits=True, top_logprobs=4))
    assert result.logits.shape == (rows, VOCAB)
    assert int(result.logits[-1].argmax()) == result.next_token
    logprobs = result.logits[-1].astype(np.float64)
    logprobs -= np.logaddexp.reduce(logprobs)
    best = np.argsort(-logprobs)[:4]
    [row] = result.logprobs
    assert [entry.id for entry in row.top] == best.tolist()
    assert [entry.logprob for entry in row.top] == pytest.approx(logprobs[best].tolist(), abs=1e-5)
    assert row.chosen == pytest.approx(logprobs[result.next_token], abs=1e-5)


async def test_answers_larger_than_a_frame(single: LocalSwarm) -> None:
    """Logits and hidden states of 1,500 rows: 1.9 MB."""
    ids = [(11 * i) % VOCAB for i in range(500)]
    async with Wire(single.peers[0]) as wire:
        whole, _ = await wire.session(reserve_tokens=2048)
        parts, _ = await wire.session(reserve_tokens=2048)
        want = pb.Want(logits=True, hidden=True)
        await whole.step(1, ids, prefill=True, sample=True, want=want)
        answer = await whole.result()
        logits = np.frombuffer(answer.logits, np.float32).reshape(500, VOCAB)
        hidden = decode(pb.FLOAT32, answer.hidden, 64)
        assert hidden.shape == (500, 64)
        # A wide tree below a long prompt: row 0 and 1,499 children.
        await parts.step(1, ids, prefill=True)
        await parts.result()
        await parts.step(2, [7] * 1500, parents=[-1] + [0] * 1499, base=500, sample=True, want=want)
        frames = []
        while not frames or not frames[-1].last_part:
            frames.append((await parts.read()).result)
        assert len(frames) == 4
        assert sum(len(frame.logits) for frame in frames) == 1500 * VOCAB * 4
        assert sum(len(frame.hidden) for frame in frames) == 1500 * 64 * 4
        await parts.step(1, ids, prefill=True)  # the session is well, and says so in a sentence
        await parts.refused(grpc.StatusCode.INVALID_ARGUMENT, "step 1 is stale")
        assert int(logits[-1].argmax()) == answer.next_token


async def test_traced_hops_come_in_the_order_of_the_route(client: AsyncSwarmModel) -> None:
    async with await client.open_session(64) as session:
        token = await start(session, PROMPT, GREEDY)
        result = await session.step(token_chain([token]), output=OutputOptions(trace=True))
        plain = await session.step(token_chain([result.next_token]))
    assert [hop.peer_id for hop in result.hops] == [stop.peer.peer_id for stop in session.route]
    times = [time for hop in result.hops for time in (hop.received_ns, hop.start_ns, hop.end_ns)]
    assert times == sorted(times)
    assert not plain.hops


# Side by side.


async def test_sessions_at_once_equal_each_alone(client: AsyncSwarmModel) -> None:
    prompts = [[1, 20 + i, 30 + i, *range(i)] for i in range(6)]
    settings = [{"temperature": 0.5 * (i % 3), "seed": i, "max_new_tokens": 10, "eos_token_id": -1} for i in range(6)]
    alone = [await client.generate(p, **s) for p, s in zip(prompts, settings, strict=True)]
    together = await asyncio.gather(*(client.generate(p, **s) for p, s in zip(prompts, settings, strict=True)))
    assert together == alone


async def test_answer_cut_short_frees_everything(client: AsyncSwarmModel, swarm: LocalSwarm) -> None:
    stream = client.stream(PROMPT, max_new_tokens=200, eos_token_id=-1)
    async for _ in stream:
        break
    assert swarm.peers[0].admission.sessions == 1
    await stream.aclose()  # nothing_leaks sees to the rest


async def test_cancelled_in_the_middle_of_a_step_frees_everything(client: AsyncSwarmModel, swarm: LocalSwarm) -> None:
    gate = threading.Event()
    session = await client.open_session(64)
    token = await start(session, PROMPT, GREEDY)
    swarm.peers[1].engine.call(lambda: gate.wait(10) and None)
    step = asyncio.create_task(session.step(token_chain([token])))
    await settled(swarm.peers[0])
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    session.close()
    gate.set()


# Deadlines.


async def test_step_whose_deadline_passed_is_not_computed(single: LocalSwarm) -> None:
    async with Wire(single.peers[0]) as wire:
        session, token = await wire.prefilled(PROMPT)
        gate = threading.Event()
        wire.peer.engine.call(lambda: gate.wait(0.1) and None)
        await session.step(2, [token], base=len(PROMPT), sample=True, deadline_ms=20)
        await session.refused(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline passed")
        other, _ = await wire.prefilled(PROMPT)
        await other.step(2, [token], base=len(PROMPT), sample=True, deadline_ms=10_000)
        assert (await other.result()).sampled


async def test_passed_deadline_with_more_behind_it_ends_only_its_session() -> None:
    async with local_swarm(tiny_llama(), [range(0, 4)]) as swarm, Wire(swarm.peers[0]) as wire:
        session, _ = await wire.session()
        gate = threading.Event()
        wire.peer.engine.call(lambda: gate.wait(0.1) and None)
        for step in (1, 2):
            await session.step(step, [7, 8], base=2 * step - 2, prefill=True, deadline_ms=20)
        await session.refused(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline passed")
        await settled(wire.peer)
        assert (await wire.prefilled(PROMPT))[1] is not None


# Codecs and routes.


@pytest.mark.parametrize(("codec", "share"), [("bf16", 0.8), ("int8", 0.6)])
async def test_lossy_codecs_agree_mostly(client: AsyncSwarmModel, swarm: LocalSwarm, codec: str, share: float) -> None:
    prompts = [[1, *range(i, i + 6)] for i in range(0, 240, 6)]
    exact = [await next_token(client, prompt) for prompt in prompts]
    async with swarm.connect(codec=codec) as lossy:
        rough = [await next_token(lossy, prompt) for prompt in prompts]
        long = await lossy.generate(PROMPT, max_new_tokens=12, eos_token_id=-1)
    assert len(long) == len(PROMPT) + 12
    agreeing = sum(a == b for a, b in zip(exact, rough, strict=True)) / len(prompts)
    assert agreeing >= share, agreeing


async def next_token(client: AsyncSwarmModel, prompt: list[int]) -> int:
    async with await client.open_session(64) as session:
        return await start(session, prompt, GREEDY)


async def test_route_takes_part_of_an_overlapping_span(client: AsyncSwarmModel) -> None:
    async with local_swarm(tiny_llama(), [range(0, 3), range(1, 4)]) as swarm, swarm.connect() as overlapping:
        route = await overlapping.route()
        assert [stop.blocks for stop in route] in ([range(0, n), range(n, 4)] for n in (1, 2, 3))
        assert any(len(stop.blocks) < stop.peer.end - stop.peer.start for stop in route)
        for params in (GREEDY, SAMPLED):
            assert await fresh(overlapping, PROMPT, params) == await fresh(client, PROMPT, params)


async def test_peer_that_shuts_down_says_so() -> None:
    async with local_swarm(tiny_llama(), [range(0, 4)]) as leaving, leaving.connect(wait_s=1) as client:
        session = await client.open_session(64)
        token = await start(session, PROMPT, GREEDY)
        leaving.peers[0].service.sessions.draining = True
        with pytest.raises(PeerError, match="leaving and takes no new sessions"):
            await client.open_session(64, wait_s=0)
        assert len(await go_on(session, token, 3)) == 3
        await leaving.peers[0].service.close()
        with pytest.raises(NoRoute, match="nobody who can be reached hosts blocks 0-3 any more; waited 1 s"):
            await session.step(token_chain([5]))
        session.close()
