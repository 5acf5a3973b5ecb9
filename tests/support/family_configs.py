"""A tiny config for every causal-LM family that the installed transformers lists: default configs with fields shrunk.

Fields are recognised by name, whatever the family; CHOICES holds what a family's own rules demand on top.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BLOCKS = 4
VOCAB = 128
CONTEXT = 128

_BLOCK_COUNTS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|encoder_layers"
# (names, value); only numbers are replaced, except that a missing head count or width is filled in.
_SIZES = [
    (_BLOCK_COUNTS, BLOCKS),
    (r"(\w+_)?vocab_size|n_vocab", VOCAB),
    (r"hidden_size|n_embd|d_model|embed_dim|dim|word_embed_proj_dim|embedding_size|decoder_hidden_size|emb_dim", 64),
    (
        r"(\w+_)?intermediate_size|(decoder_|encoder_)?ffn_dim|n_inner|d_ff|d_inner|ffn_hidden_size|dim_ff|expert_dim",
        96,
    ),
    (r"num_attention_heads|n_heads?|(decoder_|encoder_|num_decoder_|num_)?attention_heads|num_heads", 4),
    (r"num_key_value_heads|num_kv_heads", 2),
    (r"head_dim|d_kv|dim_head|attention_head_size|global_head_dim", 16),
    (r"rotary_dim", 8),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|num_experts_per_token|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_group", 1),
    (r"(\w+_)?sliding_window|(local_|attention_)?window_size|attention_chunk_size|local_attention", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length", CONTEXT),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank|qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 12),
    (r"qk_head_dim", 24),
    (r"\w+_token_id|\w+_token_index", 1),
    (r"initializer_range|init_std", 0.2),
]
_SIZES_BY_NAME = [(re.compile(names), value) for names, value in _SIZES]
# Towers have another number of blocks than the text.
_OTHER_SENSES = {"num_hidden_layers": 2, "depth": 2}
# Filled in where a family leaves them open.
_OPEN = {"num_key_value_heads": 4, "head_dim": 16}

CHOICES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local"] * BLOCKS},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}

# Ways of a family that its default config does not go.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with alibi": ("falcon", {"alibi": True}),
    "falcon with grouped heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma4_text with its own caches": ("gemma4_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "gpt2 with scaled layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama4_text with a span without ropes": (
        "llama4_text",
        {
            "no_rope_layers": [1, 0, 0, 1], "floor_scale": 8, "attn_scale": 1.0, "attn_temperature_tuning": True,
            "layer_types": ["chunked_attention", "full_attention", "full_attention", "chunked_attention"],
        },
    ),
    "opt that embeds in half its width": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi3 with two ropes": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                "long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 64,
            },
        },
    ),
}  # fmt: skip


def tiny_config(name: str) -> PretrainedConfig:
    """Four blocks, 64 wide, 128 tokens, of a family or a variant; raises whatever its config class raises."""
    family, choices = VARIANTS.get(name, (name, CHOICES.get(name, {})))
    kind = CONFIG_MAPPING[family]
    return kind.from_dict(_shrunk(kind().to_dict()) | choices)


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    blocks = next((fields[name] for name in fields if re.fullmatch(_BLOCK_COUNTS, name)), None)
    latent = "qk_rope_head_dim" in fields
    result = dict(fields)
    for name, value in fields.items():
        if name == "per_layer_config":
            del result[name]  # by index, beyond the blocks that are left
        elif isinstance(value, dict) and name.endswith("_config"):
            result[name] = _shrunk(value) | (_OTHER_SENSES if name != "text_config" else {})
        elif isinstance(value, list) and value and len(value) == blocks:
            result[name] = _chosen(value)
        elif value is None and name in _OPEN and not latent:
            result[name] = _OPEN[name]
        elif isinstance(value, int | float) and not isinstance(value, bool) and value:
            result[name] = _size(name, value, fields, latent)
    if "is_decoder" in fields:
        result["is_decoder"] = True
    return result


def _size(name: str, value: float, fields: dict[str, Any], latent: bool) -> float:
    if name == "head_dim" and latent:
        return 8  # the rotary part
    if name in ("num_key_value_heads", "num_kv_heads") and value == fields.get("num_attention_heads"):
        return 4
    for names, size in _SIZES_BY_NAME:
        if names.fullmatch(name):
            return size
    return value


def _chosen(entries: list[Any]) -> list[Any]:
    """BLOCKS entries of a list with one a block: one of each kind first."""
    first = {str(entry): index for index, entry in reversed(list(enumerate(entries)))}
    picked = sorted(first.values())[:BLOCKS]
    picked += [index for index in range(len(entries)) if index not in picked][: BLOCKS - len(picked)]
    return [entries[index] for index in sorted(picked)]
