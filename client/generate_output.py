"""What `generate` gives with `return_dict_in_generate`, by transformers' names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import PetalError
from .batch import Answer
from .beam_answers import BeamChunk
from .config import GenerationConfig
from .score_rules import score_rules
from .scores import NextScores
from .session.result import Array
from .tensors import tensor

# Rows [answers or beams, vocab] for each token.
Steps = Sequence[NDArray[np.floating]]


@dataclass(frozen=True)
class GenerateOutput:
    """`sequences`: what `generate` returns without `return_dict_in_generate`; the others where they were asked for.

    `scores` and `logits`: for each new token a tensor [answers, vocab], or [prompts x beams, vocab] of a beam search;
    of answers that had ended by then nothing was computed, and their rows are NaN. `scores` are what tokens were chosen
    by, behind penalties, rules, temperature and cut-offs, in a beam search log-probabilities; `logits` are the model's.
    `sequences_scores` [answers]: of a beam search, see BeamRules. `beam_indices` [answers, tokens]: which row of
    `scores` each token was chosen from, -1 behind the end.
    """

    sequences: Any
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    sequences_scores: Any = None
    beam_indices: Any = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def generate_output(
    sequences: Any,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Answer]],
    config: GenerationConfig,
    eos_ids: frozenset[int],
) -> GenerateOutput:
    """`groups`: the answers to each of `prompts`; an error among them has neither scores nor logits."""
    logits, scores, last = None, None, {}
    if config.num_beams > 1:
        found = [_best(group) for group in groups]
        logits = _stacked(best.steps.logits if best else () for best in found)
        scores = _stacked(best.steps.scores if best else () for best in found)
        last = _of_answers(groups, config)
    elif config.output.logits:
        answers = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
        logits = _stacked(_logits(answer) for _, answer in answers)
        scores = _stacked(_scores(prompt, answer, config, eos_ids) for prompt, answer in answers)
    return GenerateOutput(
        sequences, scores if config.output_scores else None, logits if config.output_logits else None, **last
    )


def _stacked(parts: Iterable[Steps]) -> tuple[Any, ...]:
    """The rows of all parts for each token; NaN where a part had ended."""
    tables = list(parts)
    longest = max(tables, key=len)

    def rows(table: Steps, step: int) -> NDArray[np.floating]:
        return table[step] if step < len(table) else np.full_like(longest[step], np.nan)

    steps = (np.concatenate([rows(table, step) for table in tables]) for step in range(len(longest)))
    return tuple(tensor(step.astype(np.float32)) for step in steps)


def _logits(answer: Answer) -> list[Array]:
    if isinstance(answer, PetalError):
        return []
    return [row[None] for chunk in answer if chunk.logits is not None for row in chunk.logits]


def _scores(prompt: Sequence[int], answer: Answer, config: GenerationConfig, eos_ids: frozenset[int]) -> Steps:
    if isinstance(answer, PetalError):
        return []
    score = NextScores(config, len(prompt), score_rules(config, len(prompt), config.new_tokens(len(prompt)), eos_ids))
    text = [*prompt, *(token for chunk in answer for token in chunk.ids)]
    return [score(text[: len(prompt) + i], row[0])[None] for i, row in enumerate(_logits(answer))]


def _best(group: Sequence[Answer]) -> BeamChunk | None:
    chunks = [answer[0] for answer in group if not isinstance(answer, PetalError)]
    return chunks[0] if chunks and isinstance(chunks[0], BeamChunk) else None


def _of_answers(groups: Sequence[Sequence[Answer]], config: GenerationConfig) -> dict[str, Any]:
    """What is known of whole answers alone; NaN and no beams of an error."""
    values, rows = list[float](), list[list[int]]()
    for place, group in enumerate(groups):
        for answer in group:
            chunk = None if isinstance(answer, PetalError) else answer[0]
            found = chunk if isinstance(chunk, BeamChunk) else BeamChunk([], score=np.nan)
            values.append(found.score)
            rows.append([place * config.num_beams + origin for origin in found.origins])
    width = max(map(len, rows))
    indices = tensor(np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int64))
    scores = tensor(np.array(values, np.float32)) if config.output_scores else None
    return {"sequences_scores": scores, "beam_indices": indices}
