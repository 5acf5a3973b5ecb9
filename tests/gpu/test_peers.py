"""Peers on one card through real DHT and gRPC: what they say, however the model is cut, drafted, shared or disturbed.

A swarm's greedy token is the reference's, or the reference prefers its own by no more than MARGIN logits; what was seen
stands in `kernels/NOTES.md`. Among swarms of one card nothing differs.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from petal.client.swarm import AsyncSwarmModel
from petal.peer.server import PeerServer

from tests.gpu.served import MODEL, PROMPTS, Agreement, n_blocks, reference_of
from tests.support.random_drafter import RandomDrafter
from tests.support.swarms import local_swarm, spans

pytestmark = pytest.mark.cuda

TOKENS = 48
MARGIN = 0.5
FORMATS = ("none", "int4", "nf4", "int8", "gguf")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.1}


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


async def say(client: AsyncSwarmModel, prompt: list[int], drafter: Any = "none", **settings: Any) -> list[int]:
    settings = {"max_new_tokens": TOKENS, "eos_token_id": -1, **settings}
    ids: list[int] = await client.generate(prompt, drafter=drafter, **settings)
    return ids[len(prompt) :]


@pytest.mark.parametrize("quant", FORMATS)
def test_greedy_text_is_that_of_transformers(quant: str) -> None:
    async def run() -> Agreement:
        found = Agreement()
        async with local_swarm(MODEL, spans(n_blocks(), 1), device="cuda", quant=quant) as swarm:
            assert "/sm" in swarm.peers[0].record().numerics
            async with swarm.connect() as client:
                answers = [await say(client, prompt) for prompt in PROMPTS]
            reference = reference_of(swarm.peers[0].span)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            found.take(reference, prompt, answer)
        return found

    found = asyncio.run(run())
    print(f"{quant}: {found}")
    assert found.margin <= MARGIN
    assert found.flips <= 0.05 * found.tokens


def test_another_text_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: tokens at random are no reference's choice."""

    async def run() -> Agreement:
        found = Agreement()
        async with local_swarm(MODEL, spans(n_blocks(), 1), device="cuda") as swarm:
            reference = reference_of(swarm.peers[0].span)
        found.take(reference, PROMPTS[0], random.Random(0).choices(range(1000), k=TOKENS))
        return found

    assert asyncio.run(run()).margin > MARGIN


async def _kill(peer: PeerServer) -> None:
    """Every connection breaks, and nobody answers there any more."""
    await peer._grpc.stop(None)


def test_text_depends_on_seed_and_model_alone() -> None:
    """One peer; three; drafts, random trees, sixteen sessions at a time; one of two peers dies: the same tokens."""
    prompt = PROMPTS[0]

    asyncio.run(three(asyncio.run(alone(prompt)), prompt))


async def alone(prompt: list[int]) -> dict[str, list[int]]:
    """What one peer says."""
    async with (
        local_swarm(MODEL, spans(n_blocks(), 1), device="cuda", exact=True) as swarm,
        swarm.connect(exact=True) as client,
    ):
        return {
            "greedy": await say(client, prompt),
            "sampled": await say(client, prompt, **SAMPLED),
            **{f"{seed}": await say(client, prompt, temperature=1.0, seed=seed) for seed in range(16)},
        }


async def three(expected: dict[str, list[int]], prompt: list[int]) -> None:
    """Three peers say the same, one of which dies in the end: there is another with its blocks."""
    cut = spans(n_blocks(), 3)
    async with (
        local_swarm(MODEL, [*cut, cut[1]], device="cuda", exact=True) as swarm,
        swarm.connect(exact=True) as client,
    ):
        assert await say(client, prompt) == expected["greedy"]
        for drafter in ("none", "ngram", RandomDrafter.knowing([*prompt, *expected["sampled"]], 1000, 3)):
            assert await say(client, prompt, drafter, **SAMPLED) == expected["sampled"]
        together = (say(client, prompt, temperature=1.0, seed=seed) for seed in range(16))
        for seed, said in enumerate(await asyncio.gather(*together)):
            assert said == expected[f"{seed}"], f"session {seed} of 16"
        going_on = asyncio.create_task(say(client, prompt, max_new_tokens=4 * TOKENS, **SAMPLED))
        await asyncio.sleep(0.25)
        busy = [peer for peer in swarm.peers if peer.blocks == cut[1] and peer.admission.sessions]
        assert busy, "no session to disturb"
        assert not going_on.done()
        await _kill(busy[0])
        assert (await going_on)[:TOKENS] == expected["sampled"]
