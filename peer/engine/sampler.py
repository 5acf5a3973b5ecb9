"""The end of a step: hidden states for the next stage, or at the last one logits, a walk through the tree, a token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...protocol.wire.codec import encode
from ...protocol.wire.tree import DraftTree
from ...protocol.wire.verification import VerificationResult, draw_after_prefill, verify
from ..model import Span
from .sequence import CachedSequence
from .step import Step, StepOutput


def scores(span: Span, sequences: Iterable[CachedSequence]) -> list[Tensor | None]:
    """Logits [n, vocab] of each step under way that needs them here; a batch goes through the LM head at once."""
    rows = [_scored_rows(sequence) for sequence in sequences]
    scored = [part for part in rows if part is not None]
    if not scored:
        return [None] * len(rows)
    logits = iter(span.logits(torch.cat(scored)).split([len(part) for part in scored]))
    return [None if part is None else next(logits) for part in rows]


def output_of(sequence: CachedSequence, step: Step, logits: Tensor | None) -> StepOutput:
    """What the step that is through leaves behind. Raises SamplingError."""
    header = step.header
    output = StepOutput()
    if header.want_hidden or not sequence.is_last:
        output.hidden = encode(sequence.codec, _whole(step.outputs).float().cpu().numpy())
    if logits is not None:
        values = logits.float().cpu().numpy()
        output.logits = values.tobytes() if header.want_logits else b""
        output.verification = _verified(sequence, step, values) if header.sample else None
    return output


def _scored_rows(sequence: CachedSequence) -> Tensor | None:
    step = sequence.step
    assert step is not None
    header = step.header
    if not (sequence.is_last and (header.sample or header.want_logits)):
        return None
    if header.prefill and not header.want_logits:
        return step.outputs[-1][-1:]
    return _whole(step.outputs)


def _whole(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _verified(sequence: CachedSequence, step: Step, logits: NDArray[np.float32]) -> VerificationResult:
    header, tree = step.header, step.header.tree
    if header.prefill:
        return draw_after_prefill(logits[-1], sequence.sampling, sequence.history, header.top_logprobs)
    assert isinstance(tree, DraftTree)
    return verify(tree, logits, sequence.sampling, sequence.history, header.base, header.top_logprobs)
