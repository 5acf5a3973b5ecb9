"""Tokens a round: what trees of a drafter would have brought along continuations that are known."""

from __future__ import annotations

from collections.abc import Sequence

from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import walk
from ..drafting.drafter import Drafter


def tokens_a_round(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    budget: int,
    params: SamplingParams,
) -> float:
    """Mean over all rounds of accepted nodes, row 0 included."""
    gains = [
        gain
        for prompt, known in zip(prompts, answers, strict=True)
        for gain in _gains(drafter.fresh(), prompt, known, budget, params)
    ]
    return sum(gains) / len(gains)


def _gains(
    drafter: Drafter, prompt: Sequence[int], known: Sequence[int], budget: int, params: SamplingParams
) -> list[int]:
    """Tokens that each round brings; the first token of all comes with the prompt."""
    drafter.start(prompt, params)
    gains: list[int] = []
    out = 1

    def said(_: int, path: Sequence[int]) -> int:
        at = out + len(path)
        return known[at] if at < len(known) else -1

    while out < len(known):
        accepted, _ = walk(drafter.propose([*prompt, *known[:out]], budget), said)
        gains.append(min(len(accepted), len(known) - out))
        out += gains[-1]
    return gains
