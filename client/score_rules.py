"""What settings ask of the scores of the next token: behind the penalties, before the draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.wire.sampling import Floats
from ..protocol.wire.verification import Reshape
from .tensors import LogitsProcessor, array, tensor

if TYPE_CHECKING:
    from .config import GenerationConfig

NEED_SCORES = (
    "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "logits_processor", "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip
_NEVER = float("-inf")
# Ids so far, prompt and answer, to what is added to the scores of the next.
_Bias = Callable[[Sequence[int]], Mapping[int, float]]


def score_rules(config: GenerationConfig, prompt_length: int, limit: int, eos_ids: Collection[int]) -> Reshape | None:
    """What one answer of at most `limit` tokens asks for; None where that is nothing."""
    rules = [
        *map(_adding, _biases(config, prompt_length, eos_ids)),
        *_forced(config, prompt_length + limit),
        *_decaying(config, prompt_length, eos_ids),
        *map(_adding, _suppressed(config, prompt_length)),
        *map(_processing, config.logits_processor or ()),
    ]

    def reshape(ids: Sequence[int], values: Floats) -> Floats:
        for rule in rules:
            values = rule(ids, values)
        return values

    return reshape if rules else None


def chained(first: Reshape | None, then: Reshape) -> Reshape:
    """Both, one after the other."""
    return then if first is None else lambda ids, values: then(ids, first(ids, values))


def _biases(config: GenerationConfig, prompt_length: int, eos_ids: Collection[int]) -> Iterator[_Bias]:
    if biases := _sequences(config.sequence_bias or {}):
        yield lambda ids: _biased(biases, ids)
    if size := config.no_repeat_ngram_size:
        yield lambda ids: dict.fromkeys(_repeating(ids, size), _NEVER)
    words = [list(map(int, word)) for word in config.bad_words_ids or ()]
    if bad := [(word, _NEVER) for word in words if not (len(word) == 1 and word[0] in eos_ids)]:
        yield lambda ids: _biased(bad, ids)
    least = max(config.min_length or 0, prompt_length + (config.min_new_tokens or 0))
    if least > prompt_length:
        ends = dict.fromkeys(eos_ids, _NEVER)
        yield lambda ids: ends if len(ids) < least else {}


def _suppressed(config: GenerationConfig, prompt_length: int) -> Iterator[_Bias]:
    if banned := dict.fromkeys(map(int, config.suppress_tokens or ()), _NEVER):
        yield lambda ids: banned
    if first := dict.fromkeys(map(int, config.begin_suppress_tokens or ()), _NEVER):
        yield lambda ids: first if len(ids) == prompt_length else {}


def _forced(config: GenerationConfig, most: int) -> Iterator[Reshape]:
    """The token behind a text of one, and the last that a text of `most` has room for."""
    places = ((1, config.forced_bos_token_id), (most - 1, config.forced_eos_token_id))
    for length, forced in places:
        if forced is not None:
            yield _only([forced] if isinstance(forced, int) else list(map(int, forced)), length)


def _only(tokens: Sequence[int], length: int) -> Reshape:
    def rule(ids: Sequence[int], values: Floats) -> Floats:
        if len(ids) != length:
            return values
        forced = np.full_like(values, _NEVER)
        forced[tokens] = 0.0
        return forced

    return rule


def _decaying(config: GenerationConfig, prompt_length: int, eos_ids: Collection[int]) -> Iterator[Reshape]:
    """What ends the text gets likelier behind so many tokens, by a factor for each."""
    if config.exponential_decay_length_penalty is None:
        return
    start, factor = config.exponential_decay_length_penalty
    ends, begin = list(eos_ids), prompt_length + int(start)

    def rule(ids: Sequence[int], values: Floats) -> Floats:
        if len(ids) <= begin:
            return values
        values = values.copy()
        values[ends] += np.abs(values[ends]) * (factor ** (len(ids) - begin) - 1)
        return values

    yield rule


def _adding(bias: _Bias) -> Reshape:
    def rule(ids: Sequence[int], values: Floats) -> Floats:
        added = bias(ids)
        if added:
            values = values.copy()
            values[list(added)] += list(added.values())
        return values

    return rule


def _processing(processor: LogitsProcessor) -> Reshape:
    def rule(ids: Sequence[int], values: Floats) -> Floats:
        scores = processor(tensor([list(ids)]), tensor(values.astype(np.float32)[None]))
        if tuple(scores.shape) != (1, len(values)):
            raise ValueError(
                f"a logits processor returned scores of shape {list(scores.shape)}, not [1, {len(values)}]"
            )
        return array(scores)[0].astype(np.float64)

    return rule


def _sequences(given: Any) -> list[tuple[list[int], float]]:
    """Of a mapping of ids to a bias, or a list of pairs."""
    pairs = given.items() if isinstance(given, Mapping) else given
    return [(list(map(int, ids)), float(bias)) for ids, bias in pairs]


def _biased(sequences: Sequence[tuple[list[int], float]], ids: Sequence[int]) -> dict[int, float]:
    """Of the last token of each sequence whose beginning the text ends with."""
    added: dict[int, float] = {}
    for sequence, bias in sequences:
        *start, last = sequence
        if not start or list(ids[-len(start) :]) == start:
            added[last] = added.get(last, 0.0) + bias
    return added


def _repeating(ids: Sequence[int], size: int) -> set[int]:
    """Tokens that would end a run of `size` that is in the text already."""
    start = list(ids[len(ids) - size + 1 :])
    return {ids[i + size - 1] for i in range(len(ids) - size + 1) if list(ids[i : i + size - 1]) == start}
