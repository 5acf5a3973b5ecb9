"""What is around a model's blocks, for a client that keeps token ids and logits to itself."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .hooks import Run
from .span import Span


class Ends:
    """Embedding, final norm and LM head of a model whose blocks are elsewhere, as they are in a peer's span."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.hidden_size, self.vocab_size = span.hidden_size, span.vocab_size
        # Families that place tokens within their blocks alone do not ask for positions here.
        self._placed = "position_ids" in inspect.signature(span.model.base_model.forward).parameters

    @torch.inference_mode()
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block: token ids [n], positions [n] -> hidden states [n, d]."""
        where = {"position_ids": positions[None]} if self._placed else {}
        return self._span.through(Run(range(0)), ids[None], **where)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [n, d] -> [n, vocab]."""
        return self._span.logits(hidden)
