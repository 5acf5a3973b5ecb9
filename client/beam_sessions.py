"""The sessions of a beam search: beams that go on from one text are forks, which share its pages on every peer."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

import numpy as np

from .all_or_none import all_or_none
from .drafting.drafter import ScoredTree
from .generation import common_prefix
from .session.peer_error import PeerError
from .session.result import Array, OutputOptions
from .session.session import Session

log = logging.getLogger(__name__)

# A peer may not have heard yet of sessions that ended before a fork.
TRIES = 3
_LOGITS = OutputOptions(logits=True)


class BeamSessions:
    """One for each beam; where a peer refuses a fork, two take turns in one, which is slower and gives the same."""

    def __init__(self, session: Session, prompt: Sequence[int]) -> None:
        """`session` is that of the first beam; from now on it is closed with the others."""
        self._prompt = list(prompt)
        self._of_beam = [session]
        self._most: int | None = None

    async def logits(self, answers: Sequence[Sequence[int]]) -> Array:
        """What the model says behind prompt and each answer, [beams, vocab]. Raises PeerError, NoRoute."""
        rows: dict[int, Array] = {}

        async def in_turn(session: Session) -> None:
            for beam, answer in enumerate(answers):
                if self._of_beam[beam] is session:
                    rows[beam] = await _logits_behind(session, [*self._prompt, *answer])

        await all_or_none(in_turn(session) for session in set(self._of_beam))
        return np.stack([rows[beam] for beam in range(len(answers))])

    async def follow(self, parents: Sequence[int]) -> None:
        """Let each beam go on from the session of its parent. Raises PeerError."""
        before = self._of_beam
        self._of_beam = [before[parent] for parent in parents]
        for session in set(before) - set(self._of_beam):
            session.close()
        shared = [beam for beam, session in enumerate(self._of_beam) if session in self._of_beam[:beam]]
        room = len(shared) if self._most is None else max(0, self._most - len(set(self._of_beam)))
        await all_or_none(self._fork(beam) for beam in shared[:room])

    def close(self) -> None:
        """Release what the peers hold."""
        for session in set(self._of_beam):
            session.close()

    async def _fork(self, beam: int) -> None:
        for _ in range(TRIES):
            try:
                self._of_beam[beam] = await self._of_beam[beam].fork()
                return
            except PeerError as error:
                refusal = error
            if not refusal.busy:
                break
            await asyncio.sleep(random.uniform(0.02, 0.1))
        if refusal.busy:
            self._most = len(set(self._of_beam))
        log.info("two beams take turns in one session: %s", refusal)


async def _logits_behind(session: Session, text: Sequence[int]) -> Array:
    """[vocab]"""
    kept = common_prefix(session.ids, text[:-1])
    session.rewind(kept)
    if text[kept:-1]:
        await session.prefill(text[kept:-1])
    result = await session.step(ScoredTree.root(text[-1]), output=_LOGITS)
    assert result.logits is not None
    return result.logits[0]
