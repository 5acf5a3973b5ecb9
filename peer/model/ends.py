"""What is around a model's blocks, for a client that keeps token ids and logits to itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .hooks import ForwardContext
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
        device = self._span.backend.device
        where = {"position_ids": positions.to(device)[None]} if self._placed else {}
        return self._span.through(ForwardContext(range(0)), ids.to(device)[None], **where)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [n, d] -> [n, vocab]."""
        backend = self._span.backend
        return self._span.logits(hidden.to(backend.device, backend.stream))

    def scores(self, hidden: Tensor) -> Sequence[Any]:
        """`logits` as `Backend.scores` has them."""
        return self._span.backend.scores(self.logits(hidden))
