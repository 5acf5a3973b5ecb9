"""Ropes that depend on the sequence's length: the text is transformers', whatever the split, chunks and drafts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio
import torch
from petal.protocol.wire.sampling import SamplingParams
from petal.protocol.wire.tree import DraftTree
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from ..support.disturbed import crash
from ..support.swarms import LocalSwarm, local_swarm, spans

pytestmark = pytest.mark.asyncio(loop_scope="module")

BORDER, NEW = 100, 36
LENGTHS = (70, 100, 101, 128, 300)
SETTINGS = {"max_new_tokens": NEW, "eos_token_id": -1}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A tiny Phi-3 whose angles are quite others beyond its border."""
    config = Phi3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=BORDER, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)],
            "original_max_position_embeddings": BORDER,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    with TemporaryDirectory(prefix="petal-rope-") as name:
        AutoModelForCausalLM.from_config(config).save_pretrained(Path(name) / "tiny")
        yield Path(name) / "tiny"


def prompt(length: int) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().float()
    return {length: answer(model, prompt(length)) for length in LENGTHS}


def answer(model: PreTrainedModel, ids: list[int], new: int = NEW) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found[0, len(ids) :].tolist()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm(folder: Path) -> AsyncIterator[LocalSwarm]:
    """One peer for each of three spans."""
    async with local_swarm(folder, spans(4, 3)) as running:
        yield running


@pytest.mark.parametrize("peers", [1, 3])
async def test_the_text_is_transformers_on_either_side_of_the_border(folder: Path, expected, peers: int):
    async with local_swarm(folder, spans(4, peers)) as swarm, swarm.connect() as client:
        for length in LENGTHS:
            for drafter in ("none", "ngram"):
                found = await client.generate(prompt(length), drafter=drafter, budget=8, **SETTINGS)
                assert found[length:] == expected[length], (length, drafter)
        # Side by side, in the same iterations.
        together = await client.generate([prompt(length) for length in LENGTHS], drafter="ngram", **SETTINGS)
        assert [row[len(p) :] for row, p in zip(together, map(prompt, LENGTHS), strict=True)] == list(expected.values())


async def test_one_session_goes_over_the_border_and_back(folder: Path, expected):
    async with (
        local_swarm(folder, spans(4, 2)) as swarm,
        swarm.connect() as client,
        await client.open_session(400) as session,
    ):
        config = client.generator.config({"max_new_tokens": 8, "eos_token_id": -1, "drafter": "none"})
        for length in (70, 300, 100, 128):
            answered = await client.generator.chunks(session, prompt(length), config)
            assert [id async for chunk in answered for id in chunk.ids] == expected[length][:8]


async def test_a_tree_over_the_border_is_refused(swarm):
    async with swarm.connect() as client, await client.open_session(200) as session:
        await session.prefill(prompt(98), SamplingParams())
        with pytest.raises(ValueError, match="a tree of 2 levels goes over a border of the model's rope: 1 fit here"):
            await session.step(DraftTree((1, 2, 3), (-1, 0, 1)))
        assert (await session.step(DraftTree((1, 2), (-1, 0)))).next_token is not None


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("length", [70, 100, 128])
async def test_rows_that_a_newcomer_computes_have_the_same_angles(swarm, expected, place: int, length: int):
    """A peer crashes before, at and behind the border; another's outputs or the tokens are replayed to it."""
    async with swarm.connect() as client:
        found: list[int] = []
        config = client.generator.config(SETTINGS | {"drafter": "none"})
        async for chunk in client.generator.stream(prompt(length), config):
            found += chunk.ids
            if len(found) in (3, 29, 30, 31):
                await crash(swarm.peers[place])
        assert found == expected[length]


async def test_penalties_still_tell_prompt_from_answer_behind_the_border(folder: Path):
    """Rows are sent again at the border: what was said must not become what was asked."""
    ids, settings = prompt(90), {"presence_penalty": 50.0, "drafter": "none", "max_new_tokens": 30, "eos_token_id": -1}
    async with local_swarm(folder, spans(4, 1)) as swarm, swarm.connect() as client:
        found = (await client.generate(ids, **settings))[90:]
    assert len(set(found)) == len(found)
    assert set(found) & set(ids)
