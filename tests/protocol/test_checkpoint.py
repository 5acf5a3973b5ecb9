"""Checkpoints of safetensors and from the hub: layout, values, digests, and refusal of everything broken."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from petal.protocol.checkpoint.layout import CheckpointError, arrange
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.directory.records import DIGEST_BYTES
from safetensors.torch import save_file
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).to(dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One float32 folder, untied, in a single file."""
    folder = tmp_path_factory.mktemp("single") / "tiny"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    llama().save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["6KB", "1GB"])
def test_values_equal_the_model_that_was_saved(tmp_path, tied, dtype, shard):
    model = llama(tied, dtype)
    model.save_pretrained(tmp_path / "tiny", max_shard_size=shard)
    with open_checkpoint(tmp_path / "tiny", tmp_path / "cache") as checkpoint:
        assert (checkpoint.name, checkpoint.n_blocks, checkpoint.layout.tied) == ("tiny", 3, tied)
        state = model.state_dict()
        assert set(checkpoint.tensors) == set(state) - ({"lm_head.weight"} if tied else set())
        for name, info in checkpoint.tensors.items():
            assert info.shape == tuple(state[name].shape)
            assert info.nbytes == len(checkpoint.raw(name)) == state[name].nbytes
            np.testing.assert_array_equal(checkpoint.read_f32(name), state[name].float().numpy())
            wanted = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}[dtype]
            assert checkpoint.read(name).dtype == wanted
        assert checkpoint.packed("model.layers.0.mlp.up_proj.weight").shape == (24, 16 * state[name].element_size())
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert checkpoint.shared_tensors() == {
            "embedding": ["model.embed_tokens.weight"],
            "norm": ["model.norm.weight"],
            "head": [head],
        }
        assert len(checkpoint.block_tensors(2)) == 9
        with pytest.raises(CheckpointError, match="blocks 0 to 2"):
            checkpoint.block_tensors(3)


@pytest.mark.parametrize(
    ("config", "embedding", "norm"),
    [
        (
            GPT2Config(vocab_size=48, n_embd=16, n_layer=3, n_head=2),
            "transformer.wte.weight",
            "transformer.ln_f.weight",
        ),
        (BloomConfig(vocab_size=48, hidden_size=16, n_layer=3, n_head=2), "word_embeddings.weight", "ln_f.weight"),
        (GPTNeoXConfig(**SIZES, intermediate_size=24), "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight"),
        (
            OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
            "decoder.embed_tokens.weight",
            "final_layer_norm.weight",
        ),
        (Gemma3TextConfig(**SIZES, intermediate_size=24, head_dim=8), "model.embed_tokens.weight", "model.norm.weight"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_layout_of_other_families(config: PreTrainedConfig, embedding, norm):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = set(model.state_dict())
    if config.tie_word_embeddings:
        names -= {"lm_head.weight"}
    layout = arrange(names, config.to_dict(), "model")
    assert layout.token_matrix.endswith(embedding)
    assert any(name.endswith(norm) for name in layout.norm)
    assert layout.tied == config.tie_word_embeddings
    assert len(layout.blocks) == 3
    placed = [*sum(layout.blocks, ()), *layout.embedding, *layout.norm, *(() if layout.tied else layout.head)]
    assert sorted(placed) == sorted(names)


def test_a_vision_tower_stays_outside_the_blocks():
    names = [f"language.layers.{i}.w" for i in range(3)] + [f"vision.layers.{i}.w" for i in range(5)]
    layout = arrange([*names, "language.embed_tokens.weight"], {"text_config": {"num_hidden_layers": 3}}, "model")
    assert layout.blocks[1] == ("language.layers.1.w",)
    with pytest.raises(CheckpointError, match="one stack of 4 blocks"):
        arrange(names, {"num_hidden_layers": 4}, "model")


def test_digests_follow_the_bytes_not_the_files(saved, sharded, copy, tmp_path):
    cache = tmp_path / "cache"
    one, many = open_checkpoint(saved, cache), open_checkpoint(sharded, cache)
    assert one.digest() == many.digest()
    digests = one.block_digests(0, 3)
    assert digests == many.block_digests(0, 3)
    assert list(digests) == ["0", "1", "2", "embedding", "norm", "head"]
    assert len(set(digests.values())) == 6
    # As long as peer records ask for.
    assert {len(bytes.fromhex(digest)) for digest in digests.values()} == {DIGEST_BYTES}
    assert list(one.block_digests(1, 2)) == ["1"]
    with pytest.raises(CheckpointError, match="no span"):
        one.block_digests(2, 4)

    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    other = open_checkpoint(copy, cache).block_digests(0, 3)
    assert {part for part in digests if other[part] != digests[part]} == {"1"}


def test_digests_are_cached_until_a_file_changes(copy, tmp_path):
    cache = tmp_path / "cache"
    first = open_checkpoint(copy, cache).block_digests(0, 1)
    (kept,) = cache.glob("*.json")
    assert json.loads(kept.read_text()) == first
    kept.write_text(json.dumps({"0": "f" * 64, "embedding": 7}))
    assert open_checkpoint(copy, cache).block_digests(0, 1) == {**first, "0": "f" * 64}
    (copy / "model.safetensors").touch()
    assert open_checkpoint(copy, cache).block_digests(0, 1) == first
    kept.write_text("{")
    assert open_checkpoint(copy, Path("/dev/null/no/such")).block_digests(0, 1) == first


def test_tied_head_has_the_embedding_digest(tmp_path):
    llama(tied=True).save_pretrained(tmp_path / "tiny")
    digests = open_checkpoint(tmp_path / "tiny", tmp_path / "cache").block_digests(0, 3)
    assert digests["head"] == digests["embedding"]


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_refusals_say_what_is_wrong(copy, sharded, tmp_path):
    def refused(model, match):
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(model, tmp_path / "cache")

    refused("no such model", "no file, no folder and no hub id")
    refused(tmp_path, "no config.json")
    refused(copy / "config.json", "neither a .gguf nor a .safetensors")
    edit(copy / "config.json", num_hidden_layers=4)
    refused(copy, "4 blocks")
    edit(copy / "config.json", num_hidden_layers="3")
    refused(copy, "num_hidden_layers")
    edit(copy / "config.json", num_hidden_layers=3, vocab_size=50)
    with pytest.raises(CheckpointError, match="asks for 50 rows"):
        open_checkpoint(copy / "model.safetensors").read("model.embed_tokens.weight")
    (copy / "config.json").write_text("[" * 100_000)
    refused(copy, "no valid JSON")
    (copy / "config.json").write_text("[]")
    refused(copy, "JSON object")

    folder = Path(shutil.copytree(sharded, tmp_path / "shards"))
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    checkpoint = open_checkpoint(folder)
    (folder / shards["model.layers.1.mlp.up_proj.weight"]).unlink()
    with pytest.raises(CheckpointError, match="lacks model-0"):
        checkpoint.read("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        checkpoint.read("nothing")
    for trick in ("../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "x.bin", 7):
        edit(index, weight_map={**shards, "model.norm.weight": trick})
        refused(folder, "beside it")
    edit(index, weight_map={**shards, "model.norm.weight": shards["lm_head.weight"]})
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        open_checkpoint(folder).read("model.norm.weight")


def test_types_without_a_reader_are_listed_and_refused_by_name(copy):
    state = dict(llama().state_dict())
    state["model.norm.weight"] = torch.ones(16, dtype=torch.int8)
    save_file(state, copy / "model.safetensors")
    checkpoint = open_checkpoint(copy)
    assert checkpoint.tensors["model.norm.weight"].dtype == "I8"
    with pytest.raises(CheckpointError, match="type I8"):
        checkpoint.read("model.norm.weight")


def read_all(path: Path) -> None:
    with suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read_f32(name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_checkpoint_errors_only(copy, saved, data):
    sound = (saved / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    (copy / "model.safetensors").write_bytes(damaged[:end])
    read_all(copy)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "do not suit"),
        ({"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 16]}, "do not suit"),
        ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "no valid shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [1 << 40, (1 << 40) + 16]}, "truncated"),
        ({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}, "unknown type"),
        ([], "not an object"),
    ],
)
def test_header_rules(copy, entry, match):
    other = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}
    header = json.dumps({"a": entry, "b": other}).encode()
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(copy)


def test_overlaps_and_huge_headers_are_refused(copy):
    path = copy / "model.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": {**entry, "data_offsets": [12, 28]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(CheckpointError, match="overlaps"):
        open_checkpoint(copy)
    path.write_bytes((1 << 62).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="does not fit"):
        open_checkpoint(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    for tokens, added, refused_at in ((48, 5, None), (49, 0, "49 tokens, the model has 48")):
        tokenizer = tokenizers.Tokenizer(WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
        tokenizer.add_tokens([f"added{i}" for i in range(added)])
        tokenizer.save(str(copy / "tokenizer.json"))
        if refused_at is None:
            assert open_checkpoint(copy).tokenizer().vocab_size == tokens + added
        else:
            with pytest.raises(CheckpointError, match=refused_at):
                open_checkpoint(copy).tokenizer()


def test_config_is_the_folders(saved):
    assert AutoConfig.for_model(**open_checkpoint(saved).config).num_hidden_layers == 3


def test_half_written_digests_do_not_pile_up(saved, tmp_path, monkeypatch):
    cache = tmp_path / "digests"
    cache.mkdir()
    (cache / "tmpabc.tmp").write_text("{")
    os.utime(cache / "tmpabc.tmp", (1, 1))
    (cache / "tmpxyz.tmp").write_text("{")  # somebody may be writing this one

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with open_checkpoint(saved, cache) as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.block_digests(0, 1)
        assert sorted(path.name for path in cache.iterdir()) == ["tmpabc.tmp", "tmpxyz.tmp"]
        checkpoint.block_digests(0, 1)
    assert [path.suffix for path in sorted(cache.iterdir())] == [".json", ".tmp"]
    assert (cache / "tmpxyz.tmp").exists()
