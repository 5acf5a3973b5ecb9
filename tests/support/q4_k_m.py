"""GGUF files with the shapes and types of llama.cpp's Q4_K_M files, and random codes: sizes are real, text is not."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from petal.kernels.formats.gguf import TYPES
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from ..kernels.quantized_weights import random_tensors
from ..protocol.gguf_maker import ARCHITECTURES, finish, writer_for

CONFIGS: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "gemma-3-270m": Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32768,
    ),
}  # fmt: skip
# What llama.cpp takes where a row is no multiple of 256 values.
_INSTEAD = {"q4_k": "q5_0", "q6_k": "q8_0"}


def kind_of(name: str, width: int, layers: int) -> str:
    """The type of a matrix, by its GGUF name: six bits for the tied embedding, and for half of two kinds of layers."""
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    fine = name.startswith(("token_embd", "output")) or (more and ("attn_v" in name or "ffn_down" in name))
    kind = "q6_k" if fine else "q4_k"
    return kind if width % 256 == 0 else _INSTEAD[kind]


def write_q4_k_m(path: Path, model: str) -> dict[str, int]:
    """Write one of `CONFIGS`; how many of its matrices are of which type."""
    config, counts = CONFIGS[model], {}
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    writer = writer_for(path, config)
    for seed, (hf_name, tensor) in enumerate(tensors.items()):
        if hf_name == "lm_head.weight":
            continue
        name = names.get_name(hf_name, (".weight", ".bias"))
        if tensor.dim() < 2:
            writer.add_tensor(name, np.full(tuple(tensor.shape), float("norm" in hf_name), np.float32))
            continue
        kind = kind_of(name, tensor.shape[1], config.num_hidden_layers)
        counts[kind] = counts.get(kind, 0) + 1
        blocks = random_tensors(TYPES[kind], tuple(tensor.shape), seed)["blocks"].numpy()
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    finish(writer, path)
    return counts
