"""Building spans: stored types and shards give the same blocks; a broken checkpoint is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from petal.peer.model import Span, WeightPrecision, load_span
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from ..support.families import TOLERANCE, expected_logits, reference, save_tiny, served_logits
from ..support.tiny import tiny_llama

State = dict[str, Tensor]
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(), tmp_path / "tiny"))


def rewrite(folder: Path, change: Callable[[State], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder: Path, start: int = 0, end: int = 4) -> Span:
    with open_checkpoint(folder, folder / "digests") as checkpoint:
        return load_span(checkpoint, start, end)


def set_one(name: str, value: float) -> Callable[[State], object]:
    return lambda state: state[name].view(-1)[-1].fill_(value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop(UP), f"lacks the tensor {UP}"),
        (lambda state: state.update({UP + "_x": torch.ones(2)}), f"holds the tensor {UP}_x, for which"),
        (lambda state: state.update(stray=torch.ones(2)), "holds the tensor stray, for which"),
        (lambda state: state.update({UP: torch.ones(3, 5)}), r"has shape \[3, 5\], the config asks for \[128, 64\]"),
        (set_one(UP, float("nan")), f"{UP} holds a value that is not finite"),
        (set_one("model.norm.weight", float("inf")), "model.norm.weight holds a value that is not finite"),
        (lambda state: state.update({UP: torch.ones(128, 64, dtype=torch.int8)}), "type I8"),
    ],
)
def test_broken_tensors_are_refused(folder: Path, change: Callable[[State], object], sentence: str):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(folder)
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))


def test_a_span_without_the_broken_tensor_is_served(folder: Path):
    rewrite(folder, set_one(UP, float("nan")))
    assert load(folder, 0, 2).layers
    assert load(folder, 3, 4).layers


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_hidden_layers": 5}, "one stack of 5 blocks"),
        ({"hidden_size": 32}, r"has shape \[256, 64\], the config asks for \[256, 32\]"),
        ({"intermediate_size": 64}, r"the config asks for \[64, 64\]"),
        ({"vocab_size": 300}, "the config asks for 300 rows"),
        ({"num_attention_heads": 3}, "transformers"),
        ({"model_type": "novel"}, "knows no family 'novel'"),
        ({"model_type": None}, "knows no family None"),
        ({"hidden_act": "novel"}, "transformers cannot build a llama from this config"),
    ],
)
def test_configs_that_do_not_match_are_refused(folder: Path, fields: dict[str, object], sentence: str):
    configure(folder, **fields)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(folder)
    assert re.fullmatch(r"[^\n]+\.?", str(caught.value))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_every_storage_gives_transformers_logits(tmp_path: Path, tied: bool, dtype: torch.dtype, shard: str):
    model = LlamaForCausalLM.from_pretrained(tiny_llama(tied=tied)).to(dtype)
    model.save_pretrained(tmp_path / "tiny", max_shard_size=shard)
    spans = [load(tmp_path / "tiny", 0, 2), load(tmp_path / "tiny", 2, 4)]
    with torch.inference_mode():
        expected = expected_logits(reference(tmp_path / "tiny"))
    assert (served_logits(spans) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_matrix_is_held_once(dtype: torch.dtype):
    with open_checkpoint(tiny_llama(tied=True)) as checkpoint:
        whole, head, rest = (
            load_span(checkpoint, *blocks, precision=WeightPrecision(dtype)) for blocks in ((0, 4), (0, 1), (1, 4))
        )
    matrix = 256 * 64 * dtype.itemsize
    assert whole.nbytes == pytest.approx(head.nbytes + rest.nbytes - matrix, abs=4096)
    assert torch.equal(served_logits([whole]), served_logits([head, rest]))


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_a_head_that_is_stored_is_the_models_though_the_config_ties_it(folder: Path, scale: float):
    state = load_file(folder / "model.safetensors")
    rewrite(folder, lambda state: state.update({"lm_head.weight": scale * state["model.embed_tokens.weight"]}))
    configure(folder, tie_word_embeddings=True)
    whole, parts = load(folder), [load(folder, 0, 2), load(folder, 2, 4)]
    with torch.inference_mode():
        expected = expected_logits(reference(folder))
    for spans in ([whole], parts):
        assert (served_logits(spans) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    saved = sum(span.nbytes for span in parts) - whole.nbytes
    assert saved == pytest.approx(state["lm_head.weight"].nbytes if scale == 1 else 0, abs=4096)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_few_calls_give_what_the_modules_give(tmp_path: Path, family: str):
    save_tiny(family, tmp_path / family)
    with open_checkpoint(tmp_path / family, tmp_path / "digests") as checkpoint:
        span = load_span(checkpoint, 0, 4)
    assert span.fused
    fused = served_logits([span])
    span.fused = None
    torch.testing.assert_close(fused, served_logits([span]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["olmo", "gemma2", "cohere", "granite", "phi3"])
def test_other_families_stay_with_their_modules(tmp_path: Path, family: str):
    save_tiny(family, tmp_path / family)
    with open_checkpoint(tmp_path / family, tmp_path / "digests") as checkpoint:
        assert load_span(checkpoint, 0, 4).fused is None


def test_a_llama_that_computes_otherwise_is_not_fused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The trial, where a family's name promises what its code does not keep."""
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(mlp.up_proj(x))
    )
    assert load(folder).fused is None


@pytest.mark.parametrize("family", ["gemma3_text", "bloom"])
def test_a_part_of_a_span_is_that_part(tmp_path: Path, family: str):
    """Routes may cut a span: a block keeps its own number, kind and rotary frequencies whatever part runs."""
    save_tiny(family, tmp_path / family)
    with open_checkpoint(tmp_path / family, tmp_path / "digests") as checkpoint:
        whole, cut = load_span(checkpoint, 0, 4), [load_span(checkpoint, 0, 2), load_span(checkpoint, 2, 4)]
    assert torch.equal(served_logits([_Part(whole, 0, 2), _Part(whole, 2, 4)]), served_logits(cut))


class _Part:
    """Blocks [start, end) of a larger span, as an executor sees them."""

    def __init__(self, span: Span, start: int, end: int) -> None:
        self._span, self.start, self.end = span, start, end

    def __getattr__(self, name: str) -> object:
        return getattr(self._span, name)


def test_exactness_is_promised_only_for_our_own_products(tmp_path: Path):
    obstacles = {}
    for family in ("llama", "mixtral", "bloom"):
        save_tiny(family, tmp_path / family)
        with open_checkpoint(tmp_path / family, tmp_path / "digests") as checkpoint:
            obstacles[family] = load_span(checkpoint, 0, 4).exactness_obstacle()
    assert obstacles["llama"] == ""
    assert "mlp.gate multiplies" in obstacles["mixtral"]
    assert "BloomForCausalLM" in obstacles["bloom"]
