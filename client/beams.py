"""Beam search over scores alone, as transformers has it: which beam each token goes on from, and which have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..protocol.wire.sampling import Floats

# What makes a beam that has ended the last choice of all.
_ENDED = -1e9

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Beam:
    """An answer: its tokens, the sum of their scores, and which of the beams each token was appended to."""

    ids: tuple[int, ...] = ()
    score: float = 0.0
    origins: tuple[int, ...] = ()


@dataclass(frozen=True)
class BeamRules:
    """`n_ends`: ids that end an answer, whatever else may. `limit`: tokens of the longest answer.

    The score of an answer that has ended is divided by its length to the power of `length_penalty`.
    `early_stopping`: True ends a search as soon as `num_beams` answers have ended; False where the best beam at its
    length of now, "never" where it at any length, could not be better than all of them.
    """

    num_beams: int
    limit: int
    n_ends: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


class BeamSearch:
    """`running` are the beams that go on, best first; `finished` the best that have ended, by their final scores."""

    def __init__(self, rules: BeamRules, ends: Callable[[Sequence[int]], bool]) -> None:
        """`ends`: whether an answer of these tokens has ended."""
        self.running = [Beam()]
        self.finished: list[Beam] = []
        self.done = False
        self._rules = rules
        self._ends = ends

    def advance(self, scores: Floats) -> list[int]:
        """Append a token to each beam, by scores [running, vocab]; returns which of the beams before each goes on from.

        So many candidates are looked at that `num_beams` are left where all the others end by an id.
        """
        rules = self._rules
        totals = scores + np.array([[beam.score] for beam in self.running])
        best = largest(totals.ravel(), max(2, 1 + rules.n_ends) * rules.num_beams)
        found = [self._grown(totals, *divmod(place, totals.shape[1])) for place in best]
        ended = [self._ends(beam.ids) for beam in found]
        self._finish([beam for beam, over in zip(found[: rules.num_beams], ended, strict=False) if over])
        going = [replace(beam, score=beam.score + _ENDED * over) for beam, over in zip(found, ended, strict=True)]
        self.running = sorted(going, key=lambda beam: -beam.score)[: rules.num_beams]
        self.done = all(ended) or self._is_over()
        return [beam.origins[-1] for beam in self.running]

    def _grown(self, totals: Floats, place: int, token: int) -> Beam:
        beam = self.running[place]
        return Beam((*beam.ids, token), float(totals[place, token]), (*beam.origins, place))

    def _finish(self, ended: Sequence[Beam]) -> None:
        final = [replace(beam, score=self._final(beam.score, len(beam.ids))) for beam in ended]
        self.finished = sorted([*self.finished, *final], key=lambda beam: -beam.score)[: self._rules.num_beams]

    def _final(self, score: float, length: int) -> float:
        return float(score / length**self._rules.length_penalty)

    def _is_over(self) -> bool:
        """Whether no beam that goes on can take the place of one that has ended."""
        rules, best = self._rules, self.running[0]
        if len(self.finished) < rules.num_beams:
            return False
        if rules.early_stopping is True:
            return True
        at_any_length = rules.early_stopping == "never" and rules.length_penalty > 0
        hoped = self._final(best.score, rules.limit if at_any_length else len(best.ids))
        return hoped <= self.finished[-1].score


def largest(values: Floats, count: int) -> Sequence[int]:
    """Places of the largest of values [n], in falling order; of equal ones the first."""
    if count < len(values):
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        places = np.arange(len(values))
    order = places[np.argsort(-values[places], kind="stable")][:count]
    return [int(place) for place in order]
