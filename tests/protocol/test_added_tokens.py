"""Tokens named beside tokenizer.json count as they do for transformers, wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from petal.protocol.checkpoint.safetensors_model import LocalFolder
from petal.protocol.checkpoint.tokenizer import Tokenizer
from petal.protocol.checkpoint.tokenizer_files import folder_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

END = {"content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
OBJECT = END | {"__type": "AddedToken", "special": True}
TEXT = "a <|end|>b <Tool> <tool>\n c<|image|> <|user|>d"
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "an end": {"tokenizer_config.json": {"eos_token": "<|end|>"}},
    "an end as an object": {"tokenizer_config.json": {"eos_token": OBJECT}},
    "an end that is no special token yet": {"tokenizer_config.json": {"eos_token": "<plain>"}},
    "old lists": {
        "added_tokens.json": {"<Tool>": 258, "<|end|>": 257},
        "tokenizer_config.json": {"eos_token": "<|end|>"},
    },
    "an old map": {"special_tokens_map.json": {"eos_token": END, "additional_special_tokens": ["<|user|>"]}},
    "numbered": {
        "tokenizer_config.json": {
            "eos_token": "<|end|>",
            "added_tokens_decoder": {
                "258": END | {"content": "<tool>", "rstrip": True, "special": False},
                "257": END | {"special": True},
                "256": END | {"content": "<plain>", "special": True},
            },
        }
    },
    "further": {"tokenizer_config.json": {"extra_special_tokens": ["<|user|>", "<|image|>"]}},
    "further, as it was called": {"tokenizer_config.json": {"additional_special_tokens": ["<|user|>", OBJECT]}},
    "further, with roles": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|image|>"}}},
    "a role of the model's own": {"tokenizer_config.json": {"image_token": "<|image|>", "eos_token": "<|end|>"}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    backend.normalizer = normalizers.Lowercase()  # shows which tokens are matched before it
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_tokens([AddedToken("<plain>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def ours(folder: Path) -> Tokenizer:
    return folder_tokenizer(LocalFolder(folder), {})


@pytest.mark.parametrize("case", CASES)
def test_added_tokens_count_as_for_transformers(folder: Path, case: str):
    plain = {"tokenizer_config.json": {}}
    for name, content in (plain | CASES[case]).items():
        fields = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps(content | fields))
    found, wanted = ours(folder), AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, TEXT + "<plain>", TEXT.upper()):
        ids = wanted(text, add_special_tokens=False)["input_ids"]
        assert found.encode(text, add_special=False) == ids
        for skip in (True, False):
            assert found.decode(ids, skip) == wanted.decode(ids, skip_special_tokens=skip)
    assert found.vocab_size == len(wanted)
    assert found.eos_ids == ({wanted.eos_token_id} - {None})
    found.chat_template = "{{ image_token }}"
    assert found.render_chat([]) == ("<|image|>" if "image_token" in str(CASES[case]) else "")


@pytest.mark.parametrize(
    "content",
    [
        {"eos_token": 7, "extra_special_tokens": [None, 3, {"content": 4}], "additional_special_tokens": "x"},
        {"added_tokens_decoder": {"x": END, "-1": END, "9" * 5000: END, "300": None, "301": {"content": ""}}},
        {"added_tokens_decoder": [END], "extra_special_tokens": {"a_token": ["b"]}},
    ],
)
def test_entries_that_name_no_token_are_left_out(folder: Path, content: dict[str, Any]):
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    assert ours(folder).vocab_size == 257
