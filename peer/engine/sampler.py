"""The end of a step at the last stage: logits, a walk through the tree, a token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...protocol.wire.tree import DraftTree
from ...protocol.wire.verification import VerificationResult, draw_after_prefill, verify
from ..model import Span
from .runner import joined
from .sequence import CachedSequence
from .step import Step, StepOutput

# Logits of a step's rows, float32 [vocab] each, on the host; a device hands out those that are asked for.
Scores = Sequence[NDArray[np.float32]]


def scores(span: Span, sequences: Sequence[CachedSequence]) -> list[Scores | None]:
    """Logits of each step under way that needs them here; a batch goes through the LM head at once."""
    if span.end < span.n_blocks:
        return [None] * len(sequences)
    rows = [_scored_rows(sequence) for sequence in sequences]
    scored = [part for part in rows if part is not None]
    if not scored:
        return [None] * len(rows)
    found: Scores = span.backend.scores(span.logits(joined(scored)))
    parts = (found[a:b] for a, b in pairwise(accumulate(map(len, scored), initial=0)))
    return [None if part is None else next(parts) for part in rows]


def draw(sequence: CachedSequence, step: Step, scores: Scores, output: StepOutput) -> None:
    """Add to a step's output what comes of its logits. Raises SamplingError."""
    header = step.header
    if header.want_logits:
        output.logits = b"".join(row.tobytes() for row in scores)
    if header.sample:
        output.verification = _verified(sequence, step, scores)


def _scored_rows(sequence: CachedSequence) -> Tensor | None:
    step = sequence.step
    assert step is not None
    header = step.header
    if not (sequence.is_last and (header.sample or header.want_logits)):
        return None
    if header.prefill and not header.want_logits:
        return step.outputs[-1][-1:]
    return joined(step.outputs)


def _verified(sequence: CachedSequence, step: Step, scores: Scores) -> VerificationResult:
    header, tree, reshape = step.header, step.header.tree, sequence.reshape
    if header.prefill:
        return draw_after_prefill(scores[-1], sequence.sampling, sequence.history, header.top_logprobs, reshape)
    assert isinstance(tree, DraftTree)
    return verify(tree, scores, sequence.sampling, sequence.history, header.base, header.top_logprobs, reshape)
