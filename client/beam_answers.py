"""Answers by beam search, over one session and its forks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.wire.sampling import Floats
from .arguments import SettingsError
from .beam_sessions import BeamSessions
from .beams import Beam, BeamRules, BeamSearch
from .config import GenerationConfig
from .generation import positions_for
from .output import OutputChunk, OutputCutter
from .score_rules import score_rules
from .scores import NextScores, log_softmax
from .session.result import Array, StepResult
from .session.session import Session


@dataclass
class BeamSteps:
    """What each step of a search chose from: logits and scores [beams, vocab], where they were wanted."""

    logits: list[Array] = field(default_factory=list)
    scores: list[Floats] = field(default_factory=list)


@dataclass
class BeamChunk(OutputChunk):
    """A whole answer: its final score, and which beam each of its tokens was appended to."""

    score: float = 0.0
    origins: tuple[int, ...] = ()
    steps: BeamSteps = field(default_factory=BeamSteps)


async def beam_answers(
    session: Session, prompt: Sequence[int], config: GenerationConfig, tokenizer: Tokenizer | None
) -> list[BeamChunk]:
    """The best `num_return_sequences` of `num_beams` answers, best first, as transformers finds them.

    Raises SettingsError, SamplingError, PeerError, NoRoute.
    """
    answer = _BeamAnswer(session, prompt, config, tokenizer)
    search, sessions = BeamSearch(answer.rules, answer.ends), BeamSessions(session, prompt)
    try:
        while True:
            logits = await sessions.logits([beam.ids for beam in search.running])
            parents = await asyncio.to_thread(answer.advance, search, logits)
            if search.done:
                return [answer.chunk(beam) for beam in search.finished[: config.num_return_sequences]]
            await sessions.follow(parents)
    finally:
        sessions.close()


class _BeamAnswer:
    """Where the beams of one prompt end, and what they are scored by."""

    def __init__(
        self, session: Session, prompt: Sequence[int], config: GenerationConfig, tokenizer: Tokenizer | None
    ) -> None:
        room = positions_for(session, prompt) - len(prompt)
        if config.stops and tokenizer is None:
            raise SettingsError("stop strings need a tokenizer")
        limit, eos_ids = min(config.new_tokens(len(prompt)), room + 1), config.eos_ids(tokenizer)
        self._prompt, self._config, self._tokenizer = list(prompt), config, tokenizer
        self._score = NextScores(config, len(prompt), score_rules(config, len(prompt), limit, eos_ids))
        self._stop_ids = eos_ids | (tokenizer.special_ids_of(config.stops) if tokenizer else frozenset())
        self._ending = config.ending(prompt)
        self._steps = BeamSteps()
        self.rules = BeamRules(
            config.num_beams, limit, len(self._stop_ids), config.length_penalty, config.early_stopping
        )

    def ends(self, answer: Sequence[int]) -> bool:
        if len(answer) == self.rules.limit or answer[-1] in self._stop_ids:
            return True
        if self._config.stops and self._tokenizer:
            said = self._tokenizer.decode(answer)
            if any(stop in said for stop in self._config.stops):
                return True
        return self._ending(answer) is not None

    def advance(self, search: BeamSearch, logits: Array) -> list[int]:
        """The beams' parents; see BeamSearch.advance."""
        texts = [[*self._prompt, *beam.ids] for beam in search.running]
        scores = np.stack([self._score(text, row) for text, row in zip(texts, log_softmax(logits), strict=True)])
        # Before the first step there is one beam, and all others are as it is.
        alike = self._config.num_beams if len(texts) == 1 else 1
        if self._config.output_logits:
            self._steps.logits.append(np.repeat(logits, alike, axis=0))
        if self._config.output_scores:
            self._steps.scores.append(np.repeat(scores, alike, axis=0))
        return search.advance(scores)

    def chunk(self, beam: Beam) -> BeamChunk:
        """An answer that has ended, with its text."""

        def ending(ids: Sequence[int]) -> str | None:
            return self._ending(ids) if len(ids) == len(beam.ids) else None

        cutter = OutputCutter(self._tokenizer, self.rules.limit, self._stop_ids, self._config.stops, ending)
        cut = cutter.take(list(beam.ids), StepResult())
        return BeamChunk(
            list(beam.ids), cut.text, finish_reason=cut.finish_reason, score=beam.score, origins=beam.origins,
            steps=self._steps,
        )  # fmt: skip
