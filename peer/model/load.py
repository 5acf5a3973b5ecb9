"""Building a span: the model class without weights, the span's tensors, and the check that it can be served."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from ...kernels.cpu import norm
from ...kernels.cpu.linear import PackedLinear
from ...kernels.quantized import QuantizedLinear
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from .ends import Ends
from .meta_model import Skeleton, build, initialize_buffers
from .precision import DENSE, Holding
from .span import Span
from .verify import settle
from .weights import PackedEmbedding, fill


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    progress: Callable[[int], None] = lambda nbytes: None,
    holding: Holding = DENSE,
) -> Span:
    """Build blocks [start, end) and read only their tensors; `progress` hears the bytes of each tensor read.

    Raises CheckpointError where the checkpoint does not hold what the model class needs, or where the class cannot
    be served in spans.
    """
    n_blocks = checkpoint.n_blocks
    if not 0 <= start < end <= n_blocks:
        raise CheckpointError(f"blocks {start}:{end} are no part of {checkpoint.name}, which has blocks 0:{n_blocks}")
    skeleton = build(checkpoint)
    initialize_buffers(skeleton.model, set(skeleton.inside(start, end)).__contains__)
    fill(skeleton, checkpoint, start, end, progress, holding)
    if (start, end) == (0, n_blocks) and checkpoint.one_matrix():
        _share_tied(skeleton)
    _swap_norms(skeleton, start, end)
    span = Span(skeleton.model, start, end, n_blocks)
    settle(span, [span.model.get_submodule(path) for path in sorted(skeleton.before)], holding.precision)
    return span


def load_ends(checkpoint: Checkpoint, holding: Holding = DENSE) -> Ends:
    """Build what is around the blocks, embedding, final norm and LM head, and read only that.

    Raises CheckpointError, as `load_span` does.
    """
    skeleton = build(checkpoint)
    fill(skeleton, checkpoint, 0, 0, lambda nbytes: None, holding)
    if checkpoint.one_matrix():
        _share_tied(skeleton)
    _swap_norms(skeleton, 0, 0)
    return Ends(Span(skeleton.model, 0, checkpoint.n_blocks, checkpoint.n_blocks))


def _share_tied(skeleton: Skeleton) -> None:
    """Hold the one matrix of a tied model once, where its embedding is a plain lookup."""
    model = skeleton.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) in (nn.Embedding, PackedEmbedding) and isinstance(head, (PackedLinear, QuantizedLinear)):
        path = next(path for path, module in model.named_modules() if module is embedding)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PackedEmbedding(head))


def _swap_norms(skeleton: Skeleton, start: int, end: int) -> None:
    """Norms of one native call in place of those that behave the same."""
    model = skeleton.model
    for path in skeleton.hosted(start, end):
        module = model.get_submodule(path)
        alone = len(inspect.signature(module.forward).parameters) == 1  # not gated by another input
        if alone and "RMSNorm" in type(module).__name__ and (swapped := norm.like(module)):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, swapped)
