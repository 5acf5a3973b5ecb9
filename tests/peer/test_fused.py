"""Which models run in few calls: those whose modules are written as the known ones, and no other."""

from __future__ import annotations

import pytest
import torch
from petal.peer.model import fused, load_span
from petal.peer.model.fused import KNOWN, written_alike
from petal.protocol.checkpoint.open import open_checkpoint
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from ..support.tiny import tiny_llama

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(family: str, **fields: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL, **fields))


@pytest.mark.parametrize("family", KNOWN)
def test_the_known_families_are_found(family: str) -> None:
    assert written_alike(model_of(family))


@pytest.mark.parametrize("family", ["olmo", "gemma2", "granite", "phi3", "qwen3_moe", "gpt_neox"])
def test_others_are_not(family: str) -> None:
    """OLMo clips large queries, which no trial shows; the others multiply, norm or route otherwise."""
    assert not written_alike(model_of(family))


def test_another_activation_is_not_alike() -> None:
    assert not written_alike(model_of("llama", hidden_act="gelu"))


class Renamed(modeling_llama.LlamaMLP):
    """The same in other words: a class of a name that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        """Words for people do not count."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504 (as the library writes it)


class Clipped(modeling_llama.LlamaMLP):
    """What a trial of ordinary rows would not show."""

    def forward(self, x: Tensor) -> Tensor:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj.clamp(-1e4, 1e4)


@pytest.mark.parametrize(("kind", "alike"), [(Renamed, True), (Clipped, False)])
def test_it_is_the_code_that_counts(kind: type[nn.Module], alike: bool) -> None:
    model = model_of("llama")
    for layer in model.base_model.layers:
        layer.mlp.__class__ = kind
    assert written_alike(model) == alike


def test_blocks_of_several_kinds_are_all_looked_at() -> None:
    model = model_of("llama")
    model.base_model.layers[1].mlp.__class__ = Clipped
    assert not written_alike(model)


def test_without_its_source_a_model_runs_module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(function: object) -> str:
        raise OSError("could not get source code")

    with open_checkpoint(tiny_llama()) as checkpoint:
        assert load_span(checkpoint, 0, 4).fused is not None
        fused._code.cache_clear()
        monkeypatch.setattr(fused.inspect, "getsource", no_source)
        try:
            assert load_span(checkpoint, 0, 4).fused is None
        finally:
            fused._code.cache_clear()
