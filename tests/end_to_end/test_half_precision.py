"""Peers whose weights are bfloat16: tokens depend on the seed alone, and stay near those of float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from petal.client.routing.route import NoRoute, choose_route
from petal.client.session.result import OutputOptions
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.checkpoint.open import open_checkpoint

from ..support.random_drafter import RandomDrafter
from ..support.reference import load_reference
from ..support.swarms import local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama

PROMPT = [5, 17, 90, 33, 2, 8]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


async def logits_of(client: AsyncSwarmModel, ids: list[int]) -> np.ndarray:
    """Of every row of one prefill, [rows, vocab]."""
    with closing(await client.open_session(len(ids))) as session:
        return (await session.prefill(ids, output=OutputOptions(logits=True))).logits


async def test_any_split_and_tree_gives_the_same_bits() -> None:
    logits, answers = [], []
    for peers in (1, 2, 3):
        async with (
            local_swarm(tiny_llama(), spans(4, peers), dtype="bf16", exact=True) as swarm,
            swarm.connect(exact=True) as client,
        ):
            assert {peer.record().dtype for peer in swarm.peers} == {"bf16"}
            for settings in ({}, SAMPLED):
                common = {"max_new_tokens": 40, "seed": 3, "eos_token_id": -1, **settings}
                ids = await client.generate(PROMPT, **common)
                drafter = RandomDrafter.knowing(ids, VOCAB, peers)
                answers.append((ids, await client.generate(PROMPT, drafter=drafter, budget=12, **common)))
            logits.append(await logits_of(client, ids))
    assert all(plain == drafted for plain, drafted in answers)
    assert answers[0] == answers[2] == answers[4] != answers[1] == answers[3] == answers[5]
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


async def test_as_far_from_float32_as_transformers_with_rounded_weights() -> None:
    """Weights and the rows they meet are rounded to 8 bits: closer than that is float32, much farther is a fault."""
    ids = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 100)]
    model = load_reference(open_checkpoint(tiny_llama()))
    with torch.inference_mode():
        exact = model(torch.tensor([ids])).logits[0].numpy()
        rounded = model.bfloat16()(torch.tensor([ids])).logits[0].float().numpy()
    async with local_swarm(tiny_llama(), spans(4, 2), dtype="bf16") as swarm, swarm.connect() as client:
        measured = await logits_of(client, ids)
    ours, theirs = (float(np.linalg.norm(x - exact) / np.linalg.norm(exact)) for x in (measured, rounded))
    print(f"\nrelative error to float32: {ours:.1e}, all of transformers in bfloat16 {theirs:.1e}")
    assert 1e-4 < ours < theirs


async def test_arithmetics_do_not_meet_in_exact_mode() -> None:
    """A peer in float32 and one in bfloat16 promise equal bits each, not together."""
    records = []
    for dtype in ("bf16", "float32"):
        async with local_swarm(tiny_llama(), spans(4, 1), dtype=dtype, exact=True) as swarm:
            records.append(swarm.peers[0].record())
    half, single = records
    half.end, single.start = 2, 2
    with pytest.raises(NoRoute, match="exact mode keeps to one"):
        choose_route([half, single], {}, exact=True)
    assert len(choose_route([half, single], {}, mixed=True)) == 2
