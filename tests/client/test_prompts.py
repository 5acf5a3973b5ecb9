"""What `generate` takes and gives, and what a model's own settings do where the caller says nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petal.client.config import GenerationConfig, with_defaults
from petal.client.model_text import ModelText
from petal.client.output import OutputChunk
from petal.client.prompts import Prompts
from petal.protocol.checkpoint.generation_defaults import GenerationDefaults
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.checkpoint.tokenizer import Specials, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

from ..support.tiny import tiny_llama

WORDS = {"<pad>": 0, "a": 1, "b": 2, "c": 3}


@pytest.fixture(scope="module")
def padding() -> PreTrainedTokenizerFast:
    backend = Backend(WordLevel(WORDS, unk_token="<pad>"))
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side="left")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_a_tokenizer(padding: PreTrainedTokenizerFast, side: str):
    padding.padding_side = side
    ids = [[1, 2, 3], [2]]
    batch = padding.pad({"input_ids": ids}, return_tensors="pt")
    prompts = Prompts.of(batch)
    assert prompts.rows == ids
    found = prompts.result([[[OutputChunk([7, 8])]], [[OutputChunk([9])]]], pad=5)
    # As transformers has it: answers begin behind the width of what was given.
    assert found[:, :3].equal(batch["input_ids"])
    assert found[:, 3:].tolist() == [[7, 8], [9, 5]]


@pytest.mark.parametrize(
    ("inputs", "rows", "single"),
    [
        ("a b", ["a b"], True),
        (["a", "b"], ["a", "b"], False),
        ([1, 2], [[1, 2]], True),
        ([np.int64(1), 2], [[1, 2]], True),
        (np.array([1, 2]), [[1, 2]], True),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], False),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, [[1, 2]], True),
        ({"input_ids": [[1, 2], [3]]}, [[1, 2], [3]], False),
        (BatchEncoding({"input_ids": [[0, 2]], "attention_mask": [[0, 1]]}), [[2]], False),
    ],
)
def test_forms_of_prompts(inputs: Any, rows: list[Any], single: bool):
    prompts = Prompts.of(inputs)
    assert (list(prompts.rows), prompts.single) == (rows, single)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "there is no prompt"),
        (3.5, "prompts are text, messages or token ids, not 3.5"),
        ({"text": "a"}, "has input_ids, not text"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "a number for each"),
    ],
)
def test_what_is_no_prompt_is_refused(inputs: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Prompts.of(inputs)


@pytest.mark.parametrize(
    "listed", [7, [7, 8], torch.tensor([7]), torch.tensor(7), np.array([7, 8]), np.int64(7), {7, 8}, [torch.tensor(7)]]
)
def test_ids_that_end_a_text_come_in_any_form(listed: Any):
    assert GenerationConfig(eos_token_id=listed).eos_ids(None) in ({7}, {7, 8})
    assert all(type(id) is int for id in GenerationConfig(eos_token_id=listed).eos_ids(None))


def test_a_fresh_seed():
    seeds = {GenerationConfig(seed=None, temperature=1.0).sampling.seed for _ in range(3)}
    assert len(seeds) == 3
    assert GenerationConfig(temperature=1.0).sampling == GenerationConfig(temperature=1.0).sampling


QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("defaults", "settings", "wanted"),
    [
        (QWEN, {}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}),
        (QWEN, {"do_sample": False}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        (QWEN, {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        (QWEN, {"temperature": 0.2, "top_k": 0}, {"temperature": 0.2, "top_p": 0.8, "repetition_penalty": 1.1}),
        (QWEN, {"repetition_penalty": 1.0, "do_sample": False}, {}),
        (QWEN | {"do_sample": False}, {}, {"repetition_penalty": 1.1}),
        (QWEN | {"do_sample": False}, {"do_sample": True}, {k: v for k, v in QWEN.items() if k != "do_sample"}),
        ({}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({}, {}, {}),
        ({"do_sample": True, "temperature": "hot", "top_k": None, "top_p": True}, {}, {"temperature": 1.0}),
    ],
)
def test_the_models_own_sampling(tmp_path: Path, defaults: dict, settings: dict, wanted: dict):
    text = ModelText.of(open_checkpoint(folder(tmp_path, defaults)))
    found = with_defaults(settings, text.defaults).sampling  # type: ignore[arg-type]
    assert found == type(found)(**wanted)


def folder(path: Path, generation: dict) -> Path:
    LlamaForCausalLM.from_pretrained(tiny_llama()).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_what_is_asked_for_and_not_used_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ModelText.of(
            open_checkpoint(folder(tmp_path, {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 1.0}))
        )
    assert [record.message for record in caplog.records if "generation_config" in record.message] == [
        f"{tmp_path.name} asks for no_repeat_ngram_size, num_beams in its generation_config.json, which is not used"
    ]


def test_without_a_tokenizer_configs_say_where_a_text_ends(tmp_path: Path):
    text = ModelText.of(open_checkpoint(folder(tmp_path, {"eos_token_id": [7, 9]})))
    assert text.tokenizer is None
    assert "has no tokenizer.json" in text.lack
    assert with_defaults({}, text.defaults).eos_ids(None) == {7, 9}
    assert with_defaults({"eos_token_id": -1}, text.defaults).eos_ids(None) == set()
    (tmp_path / "generation_config.json").unlink()
    assert ModelText.of(open_checkpoint(tmp_path)).defaults.eos_ids == {2}
    given = Tokenizer(Backend(WordLevel(WORDS)), Specials(eos_ids=frozenset({3})))
    assert ModelText.of(open_checkpoint(tmp_path), given).defaults.eos_ids == {2, 3}


def test_no_defaults_leave_settings_alone():
    assert with_defaults({}, GenerationDefaults()).eos_token_id is None
