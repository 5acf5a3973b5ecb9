"""What settings ask of the scores themselves, as logits processors: behind the penalties, before the draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GenerationConfig
    from .session.local_ends import LogitsProcessor

NEED_SCORES = (
    "bad_words_ids", "begin_suppress_tokens", "logits_processor", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "sequence_bias", "suppress_tokens",
)  # fmt: skip
_NEVER = float("-inf")
# Ids so far, prompt and answer, to what is added to the scores of the next.
_Rule = Callable[[Sequence[int]], Mapping[int, float]]


def score_rules(config: GenerationConfig, prompt_length: int, eos_ids: Collection[int]) -> list[LogitsProcessor]:
    """The processors of one answer; none where nothing is asked for."""
    ends, rules = dict.fromkeys(eos_ids, _NEVER), list[_Rule]()
    if biases := _sequences(config.sequence_bias or {}):
        rules.append(lambda ids: _biased(biases, ids))
    if size := config.no_repeat_ngram_size:
        rules.append(lambda ids: dict.fromkeys(_repeating(ids, size), _NEVER))
    words = [list(map(int, word)) for word in config.bad_words_ids or ()]
    if bad := [(word, _NEVER) for word in words if not (len(word) == 1 and word[0] in eos_ids)]:
        rules.append(lambda ids: _biased(bad, ids))
    least = max(config.min_length or 0, prompt_length + (config.min_new_tokens or 0))
    if least > prompt_length:
        rules.append(lambda ids: ends if len(ids) < least else {})
    if banned := dict.fromkeys(map(int, config.suppress_tokens or ()), _NEVER):
        rules.append(lambda ids: banned)
    if first := dict.fromkeys(map(int, config.begin_suppress_tokens or ()), _NEVER):
        rules.append(lambda ids: first if len(ids) == prompt_length else {})
    return [_processor(rule) for rule in rules]


def _processor(rule: _Rule) -> LogitsProcessor:
    def process(ids: Any, scores: Any) -> Any:
        added = rule(ids[0].tolist())
        if added:
            scores = scores.clone()
            for token, bias in added.items():
                scores[0, token] += bias
        return scores

    return process


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
