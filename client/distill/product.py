"""What a training leaves behind: a folder that transformers loads, a model card, a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ...protocol.checkpoint.open import open_checkpoint
from ...protocol.checkpoint.tokenizer import Tokenizer
from .gguf_writer import write_gguf

_TIED = "lm_head.weight"
_CARD = """---
base_model: {target}
library_name: transformers
tags: [speculative-decoding, petal]
---
# A drafter for {target}

A Llama of {parameters:.1f}M parameters ({layers} layers, width {hidden}, one matrix for embedding and head). It guesses
what {target} says next, so that a Petal client has several tokens verified in one trip through a swarm.
It shares the vocabulary of {target} and is of no use by itself.

| on held-out texts | |
|---|---|
{figures}

Made by `petal distill`: {story}
{trimmed}"""


def save_folder(folder: Path, student: LlamaForCausalLM, tokenizer: Tokenizer, kept: Tensor | None) -> None:
    """Weights in bfloat16, config and tokenizer. `kept` are the ids of the trimmed head's rows, rising."""
    student.config.vocab_digest = tokenizer.vocab_digest
    if kept is not None:
        student.config.draft_vocabulary = kept.tolist()
    weights = {name: value.to(torch.bfloat16) for name, value in student.state_dict().items() if name != _TIED}
    student.config.dtype = torch.bfloat16
    student.save_pretrained(folder, state_dict=weights)
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text, "utf-8")


def save_card(folder: Path, student: LlamaForCausalLM, target: str, figures: Mapping[str, float], story: str) -> None:
    """README.md with the figures and how the drafter was made; the figures alone in figures.json."""
    config = student.config
    kept = getattr(config, "draft_vocabulary", None)
    trimmed = (
        f"\nPetal computes {len(kept or [])} of the {config.vocab_size} rows of its head, `draft_vocabulary` in "
        "config.json; the others are rare, and what the target says does not depend on them.\n"
    )
    card = _CARD.format(
        target=target,
        parameters=sum(p.numel() for p in student.parameters()) / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        figures="\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items()),
        story=story,
        trimmed=trimmed if kept else "",
    )
    (folder / "README.md").write_text(card, "utf-8")
    (folder / "figures.json").write_text(json.dumps(dict(figures), indent=1) + "\n", "utf-8")


def save_gguf(path: Path, folder: Path) -> None:
    """The folder's weights as Q8_0. In place of a tokenizer the file has the vocabulary's digest."""
    with open_checkpoint(folder) as checkpoint:
        config: dict[str, Any] = dict(checkpoint.config)
        write_gguf(path, config, {name: checkpoint.read_f32(name) for name in checkpoint.tensors})
