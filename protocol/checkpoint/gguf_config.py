"""The Hugging Face config that a GGUF file's metadata stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .gguf import GgufFile
from .gguf_split import SplitGguf
from .layout import CheckpointError

_LARGEST = 1 << 31
# A drafter's own part of the config, kept as metadata "petal.*".
DRAFTER_KEYS = ("vocab_digest", "draft_vocabulary")
# llama.cpp tells the 27B gemma3, whose attention scale differs, by its number of blocks.
_GEMMA3_27B_BLOCKS = 62


@dataclass(frozen=True)
class Family:
    """An architecture that can be read. `block` maps tensor names inside "blk.N." to those inside "model.layers.N."."""

    model_type: str
    architecture: str
    block: dict[str, str]
    permuted: bool = False  # the converter interleaved the rotary halves of q and k
    norm_offset: float = 0.0  # the converter added this to every norm


_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _BLOCK, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _BLOCK),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _BLOCK | _QK_NORMS),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _BLOCK | _QK_NORMS | _GEMMA_NORMS, norm_offset=1.0),
}


def family(file: GgufFile | SplitGguf) -> tuple[str, Family]:
    """The file's architecture name and how to read it; raises CheckpointError for one that is not known."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"{file.path} has the architecture {name!r}: only {', '.join(FAMILIES)} can be read.")
    return name, FAMILIES[name]


def hf_config(file: GgufFile | SplitGguf) -> dict[str, Any]:
    """The config dict; raises CheckpointError if a field is missing or impossible."""
    name, kind = family(file)
    fields = _Fields(file, name)
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", fields.integer("rope.dimension_count", hidden // heads))
    config: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.real("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if scaling := _rope_scaling(file, fields, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "gemma3":
        config |= _gemma3(config, fields)
    return config | _token_ids(file) | _drafter(file)


class _Fields:
    """Metadata of one architecture, with types and ranges checked."""

    def __init__(self, file: GgufFile | SplitGguf, architecture: str) -> None:
        self._file, self._prefix = file, architecture

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = default if (found := self.get(key)) is None else found
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
            raise self.wrong(key, "a positive number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a positive real number")
        return value

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        found = str(self.get(key))[:40]
        return CheckpointError(f"{self._file.path}: {self._prefix}.{key} must be {wanted}, found {found}.")


def _vocab_size(file: GgufFile | SplitGguf) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} holds no token_embd.weight: only whole models can be read.")
    return embedding.shape[0]


def _gemma3(config: dict[str, Any], fields: _Fields) -> dict[str, Any]:
    wide = config["num_hidden_layers"] == _GEMMA3_27B_BLOCKS
    return {
        "sliding_window": fields.integer("attention.sliding_window"),
        "rope_local_base_freq": fields.real("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _token_ids(file: GgufFile | SplitGguf) -> dict[str, int]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _drafter(file: GgufFile | SplitGguf) -> dict[str, Any]:
    """What a drafter's file says of its vocabulary, see Checkpoint; checked there."""
    found = {key: file.metadata.get(f"petal.{key}") for key in DRAFTER_KEYS}
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in found.items()
        if value is not None
    }


def _rope_scaling(file: GgufFile | SplitGguf, fields: _Fields, head_dim: int, theta: float) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    kind = fields.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
    elif kind != "linear":
        raise fields.wrong("rope.scaling.type", "none, linear or yarn")
    return scaling


def _llama3_scaling(file: GgufFile | SplitGguf, head_dim: int, theta: float) -> dict[str, Any]:
    """GGUF stores Llama 3's frequency divisors instead of their parameters: recover these, and check them."""
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{file.path}: rope_freqs.weight must be F32 of shape [{head_dim // 2}].")
    stored = file.raw(tensor.name).view(np.float32)
    factor, low, high, context = float(stored.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), stored, rtol=1e-3):
        raise CheckpointError(f"{file.path}: rope_freqs.weight does not follow Llama 3's rule, no other can be read.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
