"""Building a span: the model class without weights, the span's tensors, and the check that it can be served."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels import norm
from ..kernels.linear import PackedLinear
from ..protocol.checkpoint import Checkpoint, CheckpointError
from .span_check import settle
from .span_ends import Ends
from .span_forward import LayerSpec, Span
from .span_model import Skeleton, build, initialize_buffers
from .span_run import Attend
from .span_weights import fill

__all__ = ["Attend", "Ends", "LayerSpec", "Span", "load_ends", "load_span"]


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    progress: Callable[[int], None] = lambda nbytes: None,
    dtype: torch.dtype = torch.float32,
) -> Span:
    """Build blocks [start, end) and read only their tensors; `progress` hears the bytes of each tensor read.

    dtype: float32 or bfloat16, of linears and embeddings.

    Raises CheckpointError where the checkpoint does not hold what the model class needs, or where the class cannot
    be served in spans.
    """
    n_blocks = checkpoint.n_blocks
    if not 0 <= start < end <= n_blocks:
        raise CheckpointError(f"blocks {start}:{end} are no part of {checkpoint.name}, which has blocks 0:{n_blocks}")
    skeleton = build(checkpoint)
    initialize_buffers(skeleton.model, set(skeleton.inside(start, end)).__contains__)
    fill(skeleton, checkpoint, start, end, progress, dtype)
    if checkpoint.layout.tied and (start, end) == (0, n_blocks):
        _share_tied(skeleton)
    _swap_norms(skeleton, start, end)
    span = Span(skeleton.model, start, end, n_blocks)
    settle(span, [span.model.get_submodule(path) for path in sorted(skeleton.before)], dtype)
    return span


def load_ends(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Ends:
    """Build what is around the blocks, embedding, final norm and LM head, and read only that.

    dtype: float32 or bfloat16, of linears and embeddings. Raises CheckpointError, as `load_span` does.
    """
    skeleton = build(checkpoint)
    fill(skeleton, checkpoint, 0, 0, lambda nbytes: None, dtype)
    if checkpoint.layout.tied:
        _share_tied(skeleton)
    _swap_norms(skeleton, 0, 0)
    return Ends(Span(skeleton.model, 0, checkpoint.n_blocks, checkpoint.n_blocks))


class _SharedEmbedding(nn.Module):
    """Token embeddings out of the LM head that they are tied to."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape -> [*ids, d] float32."""
        return self.head.rows(ids.reshape(-1)).float().view(*ids.shape, -1)


def _share_tied(skeleton: Skeleton) -> None:
    """Hold the one matrix of a tied model once, where its embedding is a plain lookup."""
    model = skeleton.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and isinstance(head, PackedLinear):
        path = next(path for path, module in model.named_modules() if module is embedding)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _SharedEmbedding(head))


def _swap_norms(skeleton: Skeleton, start: int, end: int) -> None:
    """Norms of one native call in place of those that behave the same."""
    model = skeleton.model
    for path in skeleton.hosted(start, end):
        module = model.get_submodule(path)
        alone = len(inspect.signature(module.forward).parameters) == 1  # not gated by another input
        if alone and "RMSNorm" in type(module).__name__ and (swapped := norm.like(module)):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, swapped)
