"""The drafter in training: a small Llama whose embedding begins as the target's leading directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .shape import DrafterShape


def new_student(shape: DrafterShape, matrix: Tensor, special: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """A fresh float32 model on `matrix`'s device. matrix: the target's embedding [vocab, width].

    `special` holds the config's ids of special tokens and the like.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        **special,
    )
    model = LlamaForCausalLM(config).to(matrix.device)
    with torch.no_grad():
        for layer in model.model.layers:
            # Both feed the residual stream: 1 / sqrt(2 layers) keeps its size at the start.
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * shape.layers) ** -0.5)
        model.model.embed_tokens.weight.copy_(leading(matrix, shape.hidden))
    return model


def leading(matrix: Tensor, width: int) -> Tensor:
    """[vocab, n] -> [vocab, width]: the rows seen along the directions that hold most of them; dot products stay."""
    rows = matrix.float()
    if width >= rows.shape[1]:
        extra = torch.randn(len(rows), width - rows.shape[1], device=rows.device) * 0.01
        return torch.cat((rows, extra), dim=1)
    _, directions = torch.linalg.eigh(rows.T @ rows)
    return rows @ directions[:, -width:].flip(1)
