"""Writes small GGUF files as llama.cpp's converter would, with the public `gguf` package's own name tables."""

from pathlib import Path

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    kind: gguf.GGMLQuantizationType | None = None,
    fields: dict | None = None,
    tokens: list[str] | None = None,
    parts: int = 0,
) -> None:
    """Write `model`, matrices quantized to `kind`; `fields` are further metadata of the architecture.

    `parts`: into so many files, NAME-00001-of-0000N.gguf and so on.
    """
    config = model.config
    limit = -(-(len(model.state_dict()) - config.tie_word_embeddings) // parts) if parts else 0
    writer = writer_for(path, config, fields, tokens, limit)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        write_tensor(writer, names.get_name(hf_name, (".weight", ".bias")), converted(hf_name, tensor, config), kind)
    finish(writer, path)


def writer_for(
    path: Path, config, fields: dict | None = None, tokens: list[str] | None = None, limit: int = 0
) -> gguf.GGUFWriter:
    """A writer that has all that such a model's file says before its tensors."""
    arch = ARCHITECTURES[config.model_type]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=limit)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{name}.{key}", value)
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    tokens = tokens or [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    return writer


def finish(writer: gguf.GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tables(path: Path, architecture: str, tables: dict) -> None:
    """A file that says nothing but its tokenizer: `tables` are metadata, numbers as arrays."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in tables.items():
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        else:
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
            add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType | None
) -> None:
    if kind is None or values.ndim < 2:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def converted(name: str, tensor: torch.Tensor, config) -> np.ndarray:
    """What the converter does to a tensor: llama's q and k are permuted, gemma's norms are raised by 1."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    values = tensor.float().numpy()
    if config.model_type == "llama" and heads:
        rows = values.shape[0] // heads // 2
        return values.reshape(heads, 2, rows, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape).copy()
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values
