"""Writes a Llama as a GGUF file: matrices as Q8_0, all else as it is. The container is that of the package gguf."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from ...protocol.checkpoint.gguf_config import DRAFTER_KEYS, FAMILIES
from .shape import GROUP, DistillError

_FAMILY = "llama"
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"} | {
    f"model.layers.{{}}.{hf}": f"blk.{{}}.{gguf}" for gguf, hf in FAMILIES[_FAMILY].block.items()
}

Tensors = Mapping[str, npt.NDArray[Any]]


def write_gguf(path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write in one atomic step. `config` and `tensors`: a Llama's with tied head, Hugging Face's names, float32.

    Raises DistillError for a matrix whose rows do not consist of whole groups.
    """
    stored = {_gguf_name(name): _stored(name, values, config) for name, values in tensors.items()}
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, _FAMILY)
    for key, value in _metadata(config).items():
        _add(writer, key, value)
    for name, (values, kind) in stored.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)


def _stored(
    name: str, values: npt.NDArray[Any], config: Mapping[str, Any]
) -> tuple[npt.NDArray[Any], GGMLQuantizationType]:
    """The values as the file has them, and their type."""
    if values.ndim == 1:
        return values.astype(np.float32), GGMLQuantizationType.F32
    if values.shape[-1] % GROUP:
        raise DistillError(f"{name} has rows of {values.shape[-1]} values, Q8_0 needs multiples of {GROUP}.")
    kind = GGMLQuantizationType.Q8_0
    return quantize(np.ascontiguousarray(_converted(name, values, config)), kind), kind


def _gguf_name(name: str) -> str:
    module, _, field = name.rpartition(".")
    parts = module.split(".")
    if parts[1:2] == ["layers"]:
        block, parts[2] = parts[2], "{}"
        return f"{_NAMES['.'.join(parts)].format(block)}.{field}"
    return f"{_NAMES[module]}.{field}"


def _converted(name: str, values: npt.NDArray[np.float32], config: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The family's habit: the rotary pairs of q and k lie side by side in each head."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    pairs = values.shape[0] // config[heads] // 2
    return values.reshape(config[heads], 2, pairs, -1).swapaxes(1, 2).reshape(values.shape)


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
    }
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        **{f"{_FAMILY}.{key}": int(config[field]) for key, field in numbers.items()},
        f"{_FAMILY}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{_FAMILY}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **{f"tokenizer.ggml.{r}_token_id": config[key] for r, key in roles.items() if type(config.get(key)) is int},
        **{f"petal.{key}": config[key] for key in DRAFTER_KEYS if key in config},
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
