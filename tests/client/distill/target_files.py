"""A tiny target that chats: a random Llama with a word-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64
SPECIAL = ["<s>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_target(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Save one into `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    # The words of turns.py, by which a template's frame is found.
    words = [*SPECIAL, "UserWordsOne", "AssistantWords", "UserWordsTwo"]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
