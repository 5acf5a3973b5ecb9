"""Scores as transformers returns them: what each token of an answer was chosen by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..protocol.wire.sampling import Floats, TokenCounts, candidates, processed
from ..protocol.wire.verification import Reshape, TokenHistory
from .config import GenerationConfig


class NextScores:
    """Scores of the token behind a prompt of `prompt_length` tokens and an answer so far, as `config` asks for them."""

    def __init__(self, config: GenerationConfig, prompt_length: int, reshape: Reshape | None) -> None:
        self._config, self._prompt_length, self._reshape = config, prompt_length, reshape

    def __call__(self, ids: Sequence[int], values: NDArray[np.floating]) -> Floats:
        """Behind `ids`, prompt and answer, given logits or log-probabilities [vocab]: -inf for what cannot follow.

        Raises SamplingError.
        """
        params = self._config.sampling
        counts = TokenHistory(list(ids), self._prompt_length).counts(None) if params.penalized else TokenCounts()
        scores = processed(values, params, counts, ())
        if self._reshape:
            scores = self._reshape(ids, scores)
        if params.temperature:
            drawn, scaled = candidates(scores, params)
            scores = np.full(len(scores), -np.inf)
            scores[drawn] = scaled
        return log_softmax(scores) if self._config.renormalize_logits else scores


def log_softmax(values: NDArray[np.floating]) -> Floats:
    """Log-probabilities of logits [..., vocab]."""
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
