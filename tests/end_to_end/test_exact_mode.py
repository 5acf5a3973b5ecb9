"""The same bits for a row whatever surrounds it: batch, tree, chunk, rewind, fork, eviction, number of peers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from petal.client.session.result import OutputOptions
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel, ConnectError
from petal.protocol.wire.sampling import SamplingParams
from petal.protocol.wire.tree import DraftTree

from ..support.swarms import local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama
from ..support.trees import token_chain

LENGTH = 96
LOGITS = OutputOptions(logits=True)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tokens(seed: int, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


# Whatever three peers could get wrong, two can; their splits are compared bit by bit on any day.
@pytest.fixture(params=[1, 2, pytest.param(3, marks=pytest.mark.full)], ids=lambda n: f"{n}-peers")
async def client(request: pytest.FixtureRequest) -> AsyncIterator[AsyncSwarmModel]:
    async with (
        local_swarm(tiny_llama(), spans(4, request.param), exact=True) as swarm,
        swarm.connect(exact=True) as model,
    ):
        yield model


async def alone(client: AsyncSwarmModel, ids: list[int], chunk: int = 0) -> np.ndarray:
    """Logits of every row of a fresh session, [rows, vocab]."""
    with closing(await client.open_session(len(ids) + 64)) as session:
        return (await session.prefill(ids, output=LOGITS, chunk=chunk)).logits


async def in_decode_steps(client: AsyncSwarmModel, ids: list[int], prompt: int = 8) -> np.ndarray:
    """The same rows, one token a step behind a short prompt."""
    with closing(await client.open_session(len(ids) + 64)) as session:
        first = await session.prefill(ids[:prompt], SamplingParams(), output=LOGITS)
        rest = [await session.step(token_chain([token]), output=LOGITS) for token in ids[prompt:]]
        return np.concatenate([first.logits, *(step.logits for step in rest)])


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert np.array_equal(a, b), f"{(a != b).any(axis=1).sum()} of {len(a)} rows differ"


async def test_every_chunk_size_gives_the_same_bits(client: AsyncSwarmModel) -> None:
    ids = tokens(0)
    whole = await alone(client, ids)
    for chunk in range(1, 65):
        assert_same(whole, await alone(client, ids, chunk))


async def test_alone_and_in_a_batch_of_eight(client: AsyncSwarmModel) -> None:
    prompts = [tokens(seed, 20 + 9 * seed) for seed in range(8)]
    expected = [await alone(client, ids) for ids in prompts]
    for way in (alone, in_decode_steps):
        for one, other in zip(expected, await asyncio.gather(*(way(client, ids) for ids in prompts)), strict=True):
            assert_same(one, other)


async def random_tree_step(session: Session, root: int, rng: random.Random) -> tuple[DraftTree, np.ndarray]:
    size = rng.randint(1, 24)
    parents = [-1, *(rng.randrange(row) for row in range(1, size))]
    tree = DraftTree((root, *rng.choices(range(VOCAB), k=size - 1)), tuple(parents))
    return tree, (await session.step(tree, output=LOGITS)).logits


async def test_every_row_of_a_random_tree_equals_its_path(client: AsyncSwarmModel) -> None:
    rng = random.Random(7)
    with closing(await client.open_session(400)) as session:
        result = await session.prefill(tokens(1, 30), SamplingParams())
        said = [*session.ids, result.next_token]
        for _ in range(6):
            tree, logits = await random_tree_step(session, said[-1], rng)
            for row in rng.sample(range(len(tree)), min(4, len(tree))):
                path = said + [tree.ids[r] for r in tree.path(row)[1:]]
                assert_same(logits[row : row + 1], (await alone(client, path))[-1:])
            # Accept a path of our own choice: what follows must not know of the others.
            leaf = rng.randrange(len(tree))
            session._sequence.commit = tree.path(leaf)
            session.ids[:] = said[:-1] + [tree.ids[r] for r in tree.path(leaf)]
            said = [*session.ids, rng.randrange(VOCAB)]


async def test_after_rewind_fork_and_the_end_of_another_session(client: AsyncSwarmModel) -> None:
    ids, other = tokens(2), tokens(3)
    expected = await alone(client, ids)
    with closing(await client.open_session(256)) as session:
        await session.prefill(ids[:50] + other[:30])
        session.rewind(50)
        with closing(await session.fork()) as child:
            with closing(await client.open_session(256)) as neighbour:
                await neighbour.prefill(other)
            # The neighbour's pages are free again, full of its rows, and about to be used here.
            assert_same(expected[50:], (await session.prefill(ids[50:], output=LOGITS)).logits)
            assert_same(expected[50:], (await child.prefill(ids[50:], output=LOGITS, chunk=7)).logits)


async def test_splits_agree_bit_by_bit() -> None:
    ids, answers = tokens(4), []
    for peers in (1, 2, 3):
        async with local_swarm(tiny_llama(), spans(4, peers), exact=True) as swarm, swarm.connect(exact=True) as client:
            answers.append(await alone(client, ids))
    assert_same(answers[0], answers[1])
    assert_same(answers[0], answers[2])


async def test_a_peer_that_does_not_promise_it_is_not_used() -> None:
    async with local_swarm(tiny_llama(), spans(4, 1)) as swarm:
        with pytest.raises(ConnectError, match="promises exact mode"):
            async with swarm.connect(exact=True, wait_s=0):
                pass


@pytest.mark.full
async def test_the_demo_model_too() -> None:
    ids = random.Random(5).choices(range(1000), k=150)
    async with local_swarm("demo", spans(30, 2), exact=True) as swarm, swarm.connect(exact=True) as client:
        whole = await alone(client, ids)
        for chunk in (1, 7, 33, 64):
            assert_same(whole, await alone(client, ids, chunk))
        for answer in await asyncio.gather(*(in_decode_steps(client, ids) for _ in range(8))):
            assert_same(whole, answer)


def test_plain_matrix_products_would_not_do() -> None:
    """The negative control: torch's own product changes a row's bits with the number of rows."""
    torch.manual_seed(0)
    weight, rows = torch.randn(1536, 576), torch.randn(64, 576)
    whole = torch.nn.functional.linear(rows, weight)
    parts = torch.cat([torch.nn.functional.linear(row[None], weight) for row in rows])
    assert not torch.equal(whole, parts)
