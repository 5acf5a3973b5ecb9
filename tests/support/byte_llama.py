"""A small Llama that reads bytes, and learns from a text: weights that no quantization has touched before."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 256


def new_llama(width: int, blocks: int, seed: int = 0) -> LlamaForCausalLM:
    """Random weights; the inner width is three times the width."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, text: bytes, steps: int, device: str, length: int = 256, rows: int = 32) -> float:
    """AdamW on random windows of `text`, bfloat16 products on a GPU; returns the last step's loss."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    noise = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(data) - length, (rows, 1), generator=noise)
        ids = data[(starts + torch.arange(length)).to(device)].long()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.cpu().eval()
    return float(loss.detach())


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """A checkpoint folder, with a tokenizer that makes one token of a byte."""
    model.save_pretrained(folder)
    # Byte-level tokenizers show bytes as these letters; an id is the byte itself.
    shown = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    hidden = (byte for byte in range(256) if byte not in shown)
    shown |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in shown.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return folder
