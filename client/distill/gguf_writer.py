"""Writes a Llama as a GGUF file of version 3: matrices as Q8_0, all else as it is."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...protocol.checkpoint.gguf_config import DRAFTER_KEYS, FAMILIES
from .shape import GROUP, DistillError

_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_F32, _Q8_0 = 0, 8
_FAMILY = "llama"
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"} | {
    f"model.layers.{{}}.{hf}": f"blk.{{}}.{gguf}" for gguf, hf in FAMILIES[_FAMILY].block.items()
}

Value = int | float | str | list[int]
Tensors = Mapping[str, npt.NDArray[Any]]


def write_gguf(path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write in one atomic step. `config` and `tensors`: a Llama's with tied head, Hugging Face's names, float32.

    Raises DistillError for a matrix whose rows do not consist of whole groups.
    """
    stored = [_stored(name, values, config) for name, values in tensors.items()]
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        _write_header(file, _metadata(config), stored)
        for *_, data in stored:
            _align(file)
            file.write(data)
    os.replace(part, path)


def quantize_q8_0(values: npt.NDArray[np.float32]) -> bytes:
    """[..., multiple of 32] -> for each group its scale, float16, and 32 signed bytes."""
    groups = values.reshape(-1, GROUP).astype(np.float32)
    scale = np.abs(groups).max(axis=1, keepdims=True) / 127
    quants = np.rint(groups / np.where(scale > 0, scale, 1)).astype(np.int8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), quants.view(np.uint8)), axis=1).tobytes()


def _stored(name: str, values: npt.NDArray[Any], config: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, bytes]:
    """Name, shape, type and bytes as the file has them."""
    if values.ndim == 1:
        return _gguf_name(name), values.shape, _F32, values.astype("<f4").tobytes()
    if values.shape[-1] % GROUP:
        raise DistillError(f"{name} has rows of {values.shape[-1]} values, Q8_0 needs multiples of {GROUP}.")
    return _gguf_name(name), values.shape, _Q8_0, quantize_q8_0(_converted(name, values, config))


def _gguf_name(name: str) -> str:
    module, _, field = name.rpartition(".")
    parts = module.split(".")
    if parts[1:2] == ["layers"]:
        block, parts[2] = parts[2], "{}"
        return f"{_NAMES['.'.join(parts)].format(block)}.{field}"
    return f"{_NAMES[module]}.{field}"


def _converted(name: str, values: npt.NDArray[np.float32], config: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The family's habit: the rotary halves of each head of q and k are interleaved."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    half = values.shape[0] // config[heads] // 2
    return values.reshape(config[heads], 2, half, -1).swapaxes(1, 2).reshape(values.shape)


def _metadata(config: Mapping[str, Any]) -> dict[str, Value]:
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
        "general.architecture": _FAMILY,
        **{f"{_FAMILY}.{key}": int(config[field]) for key, field in numbers.items()},
        f"{_FAMILY}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{_FAMILY}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **{f"tokenizer.ggml.{r}_token_id": config[key] for r, key in roles.items() if type(config.get(key)) is int},
        **{f"petal.{key}": config[key] for key in DRAFTER_KEYS if key in config},
    }


def _write_header(file: BinaryIO, metadata: Mapping[str, Value], stored: Iterable[tuple[Any, ...]]) -> None:
    stored = list(stored)
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for name, shape, kind, data in stored:
        # The fastest dimension comes first.
        file.write(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset))
        offset += -(-len(data) // _ALIGNMENT) * _ALIGNMENT


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + np.array(value, "<i4").tobytes()
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
