"""transformers' arguments: what asks for something is done or refused by name, the rest is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from petal.client.arguments import SettingsError
from petal.client.config import GenerationConfig, with_defaults
from petal.client.prompts import Prompts
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.checkpoint.generation_defaults import GenerationDefaults
from petal.protocol.errors import PetalError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteriaList, TextIteratorStreamer
from transformers import GenerationConfig as TheirConfig
from transformers.generation import BaseStreamer, EosTokenCriteria, TextStreamer

from ..support.swarms import local_swarm
from ..support.tiny import VOCAB, tiny_llama

PROMPT = [5, 17, 90]
PAD = 3


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def model() -> AsyncIterator[AsyncSwarmModel]:
    async with local_swarm(tiny_llama(), [range(4)]) as swarm, swarm.connect() as client:
        yield client


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama())


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i} ": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0 ")))


def config(**settings: Any) -> GenerationConfig:
    return with_defaults(settings, GenerationDefaults())  # type: ignore[arg-type]


NEUTRAL: list[dict[str, Any]] = [
    {"num_beams": 1}, {"use_cache": True}, {"min_new_tokens": 0}, {"length_penalty": 1.0}, {"output_scores": False},
    {"bad_words_ids": None}, {"temperature": None}, {"max_new_tokens": None}, {"token_type_ids": [[0]]},
    {"generation_config": TheirConfig()}, {"generation_config": GenerationConfig()}, {"no_repeat_ngram_size": 0},
    {"generation_config": None}, {"synced_gpus": True}, {"assistant_model": None}, {"sequence_bias": {}},
]  # fmt: skip


@pytest.mark.parametrize("settings", NEUTRAL, ids=str)
def test_what_asks_for_nothing_is_taken(settings: dict[str, Any]) -> None:
    assert config(**settings) == config()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beam_groups": 2}, "num_beam_groups=2 is not supported: num_beams alone"),
        ({"num_beams": True}, "num_beams is a number of at least 1, not True"),
        ({"force_words_ids": [[1]]}, r"force_words_ids=\[\[1\]\] is not supported"),
        ({"generation_config": TheirConfig(typical_p=0.5)}, "typical_p=0.5 is not supported: top_k, top_p and min_p"),
        ({"assistant_model": object()}, "assistant_model=.* is not supported: name a draft model with drafter="),
        ({"max_tokens": 5}, "generate has no argument max_tokens; did you mean max_new_tokens"),
        ({"zzz": 5}, "generate has no argument zzz: it knows "),
        ({"generation_config": 5}, "generation_config is a GenerationConfig of transformers or Petal, not 5"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        ({"max_time": 0}, "max_time is a number of seconds above 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        config(**settings)
    assert isinstance(caught.value, PetalError)
    assert isinstance(caught.value, ValueError)


def test_a_generation_config_speaks_where_arguments_do_not() -> None:
    given = TheirConfig(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=9)
    assert config(generation_config=given) == config(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=9)
    assert config(generation_config=given, temperature=0.7).temperature == 0.7
    # There a temperature alone draws nothing.
    assert config(generation_config=TheirConfig(temperature=0.5)).sampling.temperature == 0
    ours = GenerationConfig(eos_token_id=torch.tensor([4, 5]), seed=3)  # type: ignore[arg-type]
    assert (config(generation_config=ours).seed, config(generation_config=ours).eos_ids(None)) == (3, {4, 5})


def test_lengths() -> None:
    assert config(max_length=10).new_tokens(3) == 7
    assert config(max_length=10, max_new_tokens=5).new_tokens(3) == 5
    with pytest.raises(SettingsError, match="a prompt of 10 tokens leaves no room in max_length=10"):
        config(max_length=10).new_tokens(10)


def test_prompt_lookup_is_drafting_from_the_text() -> None:
    found = config(prompt_lookup_num_tokens=6)
    assert (found.drafter, found.budget) == ("ngram", 6)


def test_padding_without_a_mask() -> None:
    padded = torch.tensor([[PAD, PAD, 5, PAD, 7], [1, 2, 5, 6, PAD]])
    assert Prompts.of(padded, pad=PAD).rows == [[5, PAD, 7], [1, 2, 5, 6]]
    assert Prompts.of(padded, torch.ones_like(padded), PAD).rows == padded.tolist()
    assert Prompts.of(padded).rows == padded.tolist()
    assert Prompts.of([[PAD, 5]], pad=PAD).rows == [[PAD, 5]]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "form",
    [
        {"input_ids": PROMPT},
        {"input_ids": torch.tensor([PROMPT])},
        {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.tensor([[1, 1, 1]])},
        {"input_ids": torch.tensor([[9, *PROMPT]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
        {"input_ids": torch.tensor([[PAD, *PROMPT]]), "pad_token_id": PAD},
        {"inputs": [np.int64(5), np.int32(17), torch.tensor(90)]},
        {"input_ids": PROMPT, "max_length": 11, "max_new_tokens": None},
    ],
    ids=str,
)
async def test_prompts_by_transformers_names(model: AsyncSwarmModel, theirs: Any, form: dict[str, Any]) -> None:
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    found = await model.generate(**{"max_new_tokens": 8, "eos_token_id": -1, **form})
    found = found[0].tolist() if hasattr(found, "tolist") else found
    assert found[-8:] == expected[0, 3:].tolist()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_padded_batch_by_its_mask(model: AsyncSwarmModel) -> None:
    ids = torch.tensor([[PAD, PAD, *PROMPT], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": -1}
    found = await model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    alone = await model.generate(PROMPT, **settings)
    assert found.sequences[0].tolist() == [PAD, PAD, *alone]
    assert found["sequences"] is found.sequences


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give prompts once"),
        ({"inputs": PROMPT, "input_ids": PROMPT}, "give prompts once"),
        ({"inputs": PROMPT, "num_return_sequences": 0}, "num_return_sequences is a number of at least 1, not 0"),
    ],
)
async def test_wrong_calls(model: AsyncSwarmModel, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        await model.generate(**arguments)


class Noting(BaseStreamer):
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.ended = 0

    def put(self, value: Any) -> None:
        self.shapes.append(tuple(value.shape))

    def end(self) -> None:
        self.ended += 1


@pytest.mark.asyncio(loop_scope="module")
async def test_streamers_of_transformers(
    model: AsyncSwarmModel, theirs: Any, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": -1}
    theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, eos_token_id=None, streamer=TextStreamer(words)
    )
    expected = capsys.readouterr().out
    await model.generate(PROMPT, streamer=TextStreamer(words), **settings)
    assert capsys.readouterr().out == expected
    assert "w5" in expected
    queued = TextIteratorStreamer(words, skip_prompt=True)
    await model.generate(PROMPT, streamer=queued, **settings)
    assert "w17" in expected.partition("".join(queued))[0]
    noting = Noting()
    await model.generate(PROMPT, streamer=noting, **settings)
    assert noting.shapes == [(1, 3), *[(1,)] * 6]
    with pytest.raises(SettingsError):
        await model.generate([0] * 9, streamer=noting, max_length=4)
    assert noting.ended == 2


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("drafter", ["none", "ngram"])
async def test_criteria_are_asked_behind_each_token(
    model: AsyncSwarmModel, theirs: Any, words: Any, drafter: str
) -> None:
    def six(ids: Any, scores: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] == len(PROMPT) + 6])

    found = await model.generate(
        PROMPT, stopping_criteria=StoppingCriteriaList([six]), eos_token_id=-1, drafter=drafter, max_new_tokens=30
    )
    assert len(found) == len(PROMPT) + 6
    stop = EosTokenCriteria(found[5])
    mine = await model.generate(PROMPT, stopping_criteria=[stop], eos_token_id=-1, drafter=drafter, max_new_tokens=30)
    assert mine == found[: len(mine)]
    assert len(mine) <= 6


@pytest.mark.asyncio(loop_scope="module")
async def test_time_ends_an_answer(model: AsyncSwarmModel) -> None:
    chunks = [chunk async for chunk in model.stream(PROMPT, max_time=1e-6, eos_token_id=-1)]
    assert [(len(chunk.ids), chunk.finish_reason) for chunk in chunks] == [(1, "time")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def local() -> AsyncIterator[AsyncSwarmModel]:
    async with local_swarm(tiny_llama(), [range(2), range(2, 4)]) as swarm, swarm.connect(local_ends=True) as client:
        yield client


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize(
    "name", ["min_new_tokens", "min_length", "no_repeat", "bad", "bias", "biases", "never", "begin", "last", "hurry"]
)
async def test_rules_of_the_scores(local: AsyncSwarmModel, theirs: Any, name: str, drafter: str) -> None:
    """As transformers has it, where the rule changes the text; `free` is what is said without."""
    prompt, settings = [5, 17, 90, 5, 17], {"max_new_tokens": 16, "do_sample": False}
    free = theirs.generate(torch.tensor([prompt]), **settings, eos_token_id=None)[0, 5:].tolist()
    rule: dict[str, Any] = {
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": free[2]},
        "min_length": {"min_length": 12, "eos_token_id": free[2]},
        "no_repeat": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
        "bad": {"bad_words_ids": [[free[1]], [free[2], free[3]]]},
        "bias": {"sequence_bias": {(free[0],): -50.0, (free[2], 7): 50.0}},
        "biases": {"sequence_bias": [[[free[0]], -50.0], [[9, 11], 50.0]]},
        "never": {"suppress_tokens": [free[0], free[4]]},
        "begin": {"begin_suppress_tokens": [free[0]]},
        "last": {"forced_eos_token_id": 9},
        "hurry": {"exponential_decay_length_penalty": (2, 4.0), "eos_token_id": 77},
    }[name]
    wanted = {"eos_token_id": None, **settings, **rule}
    expected = theirs.generate(torch.tensor([prompt]), **wanted)[0].tolist()
    plain = {key: value for key, value in wanted.items() if key in ("eos_token_id", "repetition_penalty", *settings)}
    assert theirs.generate(torch.tensor([prompt]), **plain)[0].tolist() != expected
    ours = {"eos_token_id": -1, **settings, **rule}
    assert await local.generate(prompt, drafter=drafter, **ours) == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_rules_need_the_scores(model: AsyncSwarmModel) -> None:
    with pytest.raises(SettingsError, match="bad_words_ids, min_new_tokens: the scores are needed on this machine"):
        await model.generate(PROMPT, min_new_tokens=2, bad_words_ids=[[7]])
