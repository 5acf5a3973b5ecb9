"""Building a span: the model class without weights, the span's tensors, and the check that it can be served."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels.backend import Backend, Embedding, Linear
from ...kernels.registry import backend_for
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from .ends import Ends
from .fused import llama_parts, written_alike
from .meta_model import MetaModel, build
from .precision import DENSE, WeightPrecision
from .span import Span
from .verify import verify
from .weights import fill


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    progress: Callable[[int], None] = lambda nbytes: None,
    precision: WeightPrecision = DENSE,
    backend: Backend | None = None,
) -> Span:
    """Build blocks [start, end) and read only their tensors; `progress` hears the bytes of each tensor read.

    backend: what computes, `backend_for()` unless told.

    Raises CheckpointError where the checkpoint does not hold what the model class needs, or where the class cannot
    be served in spans.
    """
    n_blocks = checkpoint.n_blocks
    if not 0 <= start < end <= n_blocks:
        raise CheckpointError(f"blocks {start}:{end} are no part of {checkpoint.name}, which has blocks 0:{n_blocks}")
    backend = backend or backend_for()
    meta = build(checkpoint, backend.device)
    meta.initialize_buffers(set(meta.inside(start, end)).__contains__)
    fill(meta, checkpoint, start, end, backend, progress, precision)
    if (start, end) == (0, n_blocks) and checkpoint.one_matrix():
        _share_tied(meta)
    _swap_norms(meta, start, end, backend)
    span = Span(meta.model, start, end, n_blocks, backend)
    if written_alike(meta.model):
        span.whole = backend.blocks(llama_parts(meta.model.base_model, range(start, end)))
    verify(span, [span.model.get_submodule(path) for path in sorted(meta.before)], precision.product_dtype)
    return span


def load_ends(checkpoint: Checkpoint, precision: WeightPrecision = DENSE, backend: Backend | None = None) -> Ends:
    """Build what is around the blocks, embedding, final norm and LM head, and read only that.

    Raises CheckpointError, as `load_span` does.
    """
    backend = backend or backend_for()
    meta = build(checkpoint, backend.device)
    fill(meta, checkpoint, 0, 0, backend, precision=precision)
    if checkpoint.one_matrix():
        _share_tied(meta)
    _swap_norms(meta, 0, 0, backend)
    return Ends(Span(meta.model, 0, checkpoint.n_blocks, checkpoint.n_blocks, backend))


def _share_tied(meta: MetaModel) -> None:
    """Hold the one matrix of a tied model once, where its embedding is a plain lookup."""
    model = meta.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) in (nn.Embedding, Embedding) and isinstance(head, Linear):
        path = next(path for path, module in model.named_modules() if module is embedding)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Embedding(head, getattr(embedding, "scale", 1.0)))


def _swap_norms(meta: MetaModel, start: int, end: int, backend: Backend) -> None:
    """The backend's norms in place of those that behave the same."""
    model = meta.model
    for path in meta.hosted(start, end):
        module = model.get_submodule(path)
        alone = len(inspect.signature(module.forward).parameters) == 1  # not gated by another input
        if alone and "RMSNorm" in type(module).__name__ and (swapped := norm_like(module, backend)):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, swapped)


def norm_like(module: nn.Module, backend: Backend) -> nn.Module | None:
    """A norm of the backend's that does what `module` does, found by trying; None where it is no such norm.

    Families spell the weight as itself or as an offset from one, and epsilon under several names.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    sample = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected = module(sample)
    for candidate in (weight, 1 + weight):
        norm = backend.rms_norm(candidate.detach().float(), epsilon)
        if expected.shape == sample.shape and torch.allclose(norm(sample), expected, rtol=1e-5, atol=1e-6):
            return norm
    return None
