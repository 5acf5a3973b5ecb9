"""Tiny random checkpoints: every path of the protocol in milliseconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_FOLDER = tempfile.TemporaryDirectory(prefix="petal-tiny-")

VOCAB = 256


@functools.cache
def tiny_llama(seed: int = 0, tied: bool = False, vocab_size: int = VOCAB, context: int = 512) -> Path:
    """A folder with a random four-block Llama; large initial weights make its choices sharp."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = Path(_FOLDER.name) / f"tiny-llama-{seed}{'-tied' if tied else ''}-{vocab_size}-{context}"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
