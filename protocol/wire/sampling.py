"""Position-keyed sampling: the noise is a pure function of (seed, sequence, position, token id).

So what a session says depends on its seed and the model alone, never on the tree, the batch, the split or a failover
(Gumbel-max with shared noise; "drafter-invariant" decoding, arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import PetalError

Floats = NDArray[np.float64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# The largest u is 1 - 2^-53, so no noise exceeds this.
_MAX_NOISE = 36.8
_LIKELIEST = 1024
MOST_BIASES = 1024


class SamplingError(PetalError, ValueError):
    """A sampling parameter out of its range; the message names the range."""


@dataclass(frozen=True)
class SamplingParams:
    """How the last stage draws a token. Defaults are greedy and leave the logits alone."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sequence: int = 0
    # Added to the scores of these ids behind the penalties; as float32, which is how peers are told.
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require(self.temperature == 0 or 1e-4 <= self.temperature <= 100, "temperature is 0 or from 0.0001 to 100")
        _require(0 <= self.top_k < 1 << 32, "top_k is 0 (off) or a positive count")
        _require(0 < self.top_p <= 1, "top_p is above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p is from 0 to 1")
        _require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty is from 0.01 to 100")
        _require(abs(self.presence_penalty) <= 100, "presence_penalty is from -100 to 100")
        _require(abs(self.frequency_penalty) <= 100, "frequency_penalty is from -100 to 100")
        _require(0 <= self.seed <= _MASK, "seed is an unsigned 64-bit integer")
        _require(0 <= self.sequence < 1 << 32, "sequence is an unsigned 32-bit integer")
        _require(len(self.logit_bias) <= MOST_BIASES, f"logit_bias has at most {MOST_BIASES} entries")
        _require(all(0 <= id < 1 << 32 for id, _ in self.logit_bias), "logit_bias has token ids as keys")
        _require(all(abs(bias) <= 100 for _, bias in self.logit_bias), "logit_bias has values from -100 to 100")

    @property
    def penalized(self) -> bool:
        """Whether scores are changed before anything else; a bias is as good as a penalty."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise SamplingError(rule)


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniforms(seed: int, sequence: int, position: int, tokens: NDArray[np.integer]) -> Floats:
    """u in (0, 1) for each token id, from a 64-bit integer hash: the same on every device."""
    key = seed
    for part in (sequence, position):
        key = _mix((key + _GOLDEN * (part + 1)) & _MASK)
    x = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(seed: int, sequence: int, position: int, tokens: NDArray[np.integer]) -> Floats:
    """Gumbel(0, 1) noise for each token id at this position."""
    return -np.log(-np.log(uniforms(seed, sequence, position, tokens)))


class TokenCounts:
    """What has been said so far: repetition counts prompt and output, presence and frequency only output."""

    def __init__(self, prompt: Iterable[int] = (), output: Iterable[int] = ()) -> None:
        self._seen: set[int] = set(prompt)
        self._output: dict[int, int] = {}
        for token in output:
            self.add_output(token)

    def add_output(self, token: int) -> None:
        self._seen.add(token)
        self._output[token] = self._output.get(token, 0) + 1

    def penalize(self, logits: Floats, params: SamplingParams, path: Sequence[int]) -> None:
        """Apply penalties, then biases, in place; `path` holds the ids between the history and this row."""
        if params.repetition_penalty != 1:
            seen = np.fromiter(self._seen.union(path), np.int64)
            values = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = dict(self._output)
            for token in path:
                counts[token] = counts.get(token, 0) + 1
            ids = np.fromiter(counts.keys(), np.int64, len(counts))
            times = np.fromiter(counts.values(), np.float64, len(counts))
            logits[ids] -= params.presence_penalty + params.frequency_penalty * times
        for token, bias in params.logit_bias:
            if token < len(logits):
                logits[token] += bias


def candidates(logits: Floats, params: SamplingParams) -> tuple[NDArray[np.int64], Floats]:
    """Ids that may be drawn and their scaled logits: / T, then top-k, top-p, min-p. [vocab] -> [n], [n]."""
    scaled = logits / params.temperature
    ids = np.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scaled >= threshold)
    if params.top_p < 1:
        ids = ids[_nucleus(scaled[ids], params.top_p)]
    if params.min_p > 0:
        kept = scaled[ids]
        ids = ids[kept >= kept.max() + math.log(params.min_p)]
    return ids, scaled[ids]


def _nucleus(scaled: Floats, top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of likeliest tokens whose probability reaches `top_p`, in increasing order."""
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    likeliest = np.arange(len(scaled))
    if len(scaled) > _LIKELIEST:
        # Sorting the vocabulary would cost more than all the rest; the nucleus nearly always lies among its likeliest.
        first = np.flatnonzero(probabilities >= np.partition(probabilities, -_LIKELIEST)[-_LIKELIEST])
        if probabilities[first].sum() > top_p + 1e-9:
            likeliest = first
    order = likeliest[np.lexsort((likeliest, -probabilities[likeliest]))]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return np.sort(order[before < top_p])


def processed(logits: NDArray[np.floating], params: SamplingParams, counts: TokenCounts, path: Sequence[int]) -> Floats:
    """The logits after penalties in float64, [vocab]; -inf forbids a token. Raises SamplingError for useless logits."""
    values = logits.astype(np.float64)
    _check(float(values.max()))
    if params.penalized:
        counts.penalize(values, params, path)
    return values


def _check(largest: float) -> None:
    """The maximum tells all: NaN where any logit is, +inf, or -inf where every token is forbidden."""
    if not math.isfinite(largest):
        raise SamplingError("the model produced a logit that is not a number or infinite, or forbids every token")


def draw(
    logits: NDArray[np.floating],
    params: SamplingParams,
    position: int,
    counts: TokenCounts,
    path: Sequence[int] = (),
    reshape: Callable[[Floats], Floats] | None = None,
) -> int:
    """The token at `position` given the logits that predict it, [vocab]; `reshape` changes them behind the penalties.

    T = 0: argmax after penalties, lowest id on ties. Otherwise argmax over the candidates of logit / T + Gumbel noise,
    computed only for tokens that can still win.
    """
    if not (params.temperature or params.penalized or reshape):
        # A device tells both without handing out its scores.
        _check(float(logits.max()))
        return int(logits.argmax())
    values = processed(logits, params, counts, path)
    if reshape:
        values = reshape(values)
        _require(bool(np.isfinite(values.max())), "logits processors leave at least one token, and numbers only")
    if params.temperature == 0:
        return int(values.argmax())
    ids, scaled = candidates(values, params)
    favourite = scaled.argmax()
    floor = scaled[favourite] + gumbel(params.seed, params.sequence, position, ids[favourite : favourite + 1])[0]
    contenders = scaled >= floor - _MAX_NOISE
    ids, scaled = ids[contenders], scaled[contenders]
    return int(ids[(scaled + gumbel(params.seed, params.sequence, position, ids)).argmax()])
