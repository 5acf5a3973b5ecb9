"""A draft model that is a tiny checkpoint: right or wrong, as a test needs it."""

from __future__ import annotations

import functools

import torch
from petal.client.drafting.model import DraftModel, ModelDrafter
from petal.peer.model import WeightPrecision, load_span
from petal.protocol.checkpoint.open import open_checkpoint

from .tiny import VOCAB, tiny_llama


@functools.cache
def tiny_drafter(seed: int) -> ModelDrafter:
    """Seed 0 has the target's own weights: it is nearly always right. Others are nearly always wrong."""
    with open_checkpoint(tiny_llama(seed)) as checkpoint:
        span = load_span(
            checkpoint,
            0,
            checkpoint.n_blocks,
            precision=WeightPrecision(torch.float32 if seed == 0 else torch.bfloat16),
        )
    return ModelDrafter(DraftModel(f"tiny-{seed}", span, VOCAB))
