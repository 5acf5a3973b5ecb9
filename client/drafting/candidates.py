"""Scores of a drafted node's children: what the target is likely to draw there, given the noise that it will add.

Drafter and target share their noise (protocol/wire/sampling.py). Taking the best few of draft logits / T + Gumbel noise
is sampling without replacement from the draft distribution (Gumbel-top-k: Kool et al., 2019), which recursive
speculative decoding (arXiv 2402.14160) proposes; here the target draws with the very same noise, hence agrees more
often.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...protocol.wire.sampling import SamplingParams, gumbel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def score_children(
    ids: Ints, logits: Floats, positions: Ints, params: SamplingParams, branch: int
) -> tuple[Ints, Floats]:
    """The likeliest `branch` successors of each row and the log-probability that the target draws them.

    ids, logits: [rows, n], each row's best candidates, the largest logit first, penalties applied. positions: [rows],
    of the successors. At T = 0 the draft's own probability tells how sure the argmax is. At T > 0 the noise is known:
    the draw is the argmax of logits + T * noise, and its uncertainty is again that of the logits alone.
    """
    values = logits
    if params.temperature:
        values = np.where(
            _possible(logits, params), logits + params.temperature * _noise(ids, positions, params), -math.inf
        )
    top = np.argsort(-values, axis=1, kind="stable")[:, :branch]
    peak = values.max(axis=1, keepdims=True)
    total = peak + np.log(np.exp(values - peak).sum(axis=1, keepdims=True))
    return np.take_along_axis(ids, top, axis=1), np.take_along_axis(values - total, top, axis=1)


def _noise(ids: Ints, positions: Ints, params: SamplingParams) -> Floats:
    noise = np.empty(ids.shape)
    for position in np.unique(positions).tolist():
        rows = positions == position
        noise[rows] = gumbel(params.seed, params.sequence, position, ids[rows])
    return noise


def _possible(logits: Floats, params: SamplingParams) -> NDArray[np.bool_]:
    """What top-k, top-p and min-p leave of the candidates, as far as the draft can tell."""
    scaled = (logits - logits[:, :1]) / params.temperature
    possible = np.ones(logits.shape, dtype=bool)
    if params.top_k:
        possible[:, params.top_k :] = False
    if params.top_p < 1:
        weights = np.exp(scaled)
        before = np.cumsum(weights, axis=1) - weights
        possible &= before < params.top_p * weights.sum(axis=1, keepdims=True)
    if params.min_p:
        possible &= scaled >= math.log(params.min_p)
    return possible
