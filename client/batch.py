"""Many answers at a time: what their prompts share is computed once, and no more of them run than the peers hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..protocol.errors import PetalError
from .all_or_none import all_or_none
from .beam_answers import beam_answers
from .config import GenerationConfig
from .connection import TREE_ROOM
from .generation import Generator, common_prefix
from .output import OutputChunk
from .session.peer_error import PeerError
from .session.session import Session

# Shorter beginnings are not worth the wait until the trunk is there.
SHARED_PREFIX = 32

Answer = list[OutputChunk] | PetalError


class Batch:
    """`num_return_sequences` answers to each prompt of one call; as many run at a time as fit.

    What all prompts begin with is computed once, where the peers have room for it beside; their sessions fork behind.
    `progress` hears how many answers are done, and of how many. Where one fails the others are given up; with
    `keep_errors` they go on, and its error is its answer.
    """

    def __init__(
        self,
        generator: Generator,
        config: GenerationConfig,
        progress: Callable[[int, int], None] | None = None,
        keep_errors: bool = False,
    ) -> None:
        self._generator = generator
        self._n = n = config.num_return_sequences
        self._beams = config.num_beams
        # What is computed apart for each prompt: a search finds all its answers at once.
        self._configs = [config] if self._beams > 1 else [replace(config, sequence=i) for i in range(n)]
        self._progress = progress
        self._keep_errors = keep_errors
        self._reserve = 0
        self._trunk: Session | None = None
        self._slots = asyncio.Semaphore(1)
        self._running = self._done = 0

    async def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[Answer]]:
        """Of each prompt. Raises SettingsError, PeerError, NoRoute."""
        parts, config = len(self._configs), self._configs[0]
        self._reserve = max(len(ids) + config.new_tokens(len(ids)) for ids in prompts) + TREE_ROOM
        shared = shared_prefix(prompts) if len(prompts) * parts > 1 else []
        total = len(prompts) * self._n
        try:
            await self._start(shared if len(shared) >= (1 if parts > 1 else SHARED_PREFIX) else [])
            found = await all_or_none(self._reported(ids, each, total) for ids in prompts for each in self._configs)
        finally:
            if self._trunk:
                self._trunk.close()
        groups = [found[i : i + parts] for i in range(0, len(found), parts)]
        return [[answer for part in group for answer in part] for group in groups]

    async def _start(self, shared: Sequence[int]) -> None:
        """See what fits; compute what the prompts share."""
        fit = await self._generator.connection.sessions_that_fit(self._reserve)
        if shared and fit > 1:
            self._trunk = await self._generator.open_session(self._configs[0], self._reserve)
            await self._trunk.prefill(shared)
            fit -= 1
        self._slots = asyncio.Semaphore(max(1, fit // self._beams))

    async def _reported(self, ids: Sequence[int], config: GenerationConfig, total: int) -> Sequence[Answer]:
        """Answers that are found together, or why there are none where that is wanted."""
        answers: Sequence[Answer]
        try:
            answers = await self._answers(ids, config)
        except PetalError as error:
            if not self._keep_errors:
                raise
            answers = [error] * (self._n // len(self._configs))
        self._done += len(answers)
        if self._progress:
            self._progress(self._done, total)
        return answers

    async def _answers(self, ids: Sequence[int], config: GenerationConfig) -> Sequence[Answer]:
        """One answer, or all of a search, as soon as there is room."""
        async with self._slots:
            session = await self._session()
            self._running += 1
            try:
                if self._beams > 1:
                    found = await beam_answers(session, ids, config, self._generator.tokenizer)
                    return [[chunk] for chunk in found]
                return [[chunk async for chunk in await self._generator.chunks(session, ids, config)]]
            finally:
                self._running -= 1
                session.close()

    async def _session(self) -> Session:
        """A fork of the trunk; a session of its own where the trunk's peers are full or gone."""
        if self._trunk:
            try:
                return await self._trunk.fork()
            except PeerError as error:
                if not (error.busy or error.gone):
                    raise
        while True:
            try:
                return await self._generator.open_session(self._configs[0], self._reserve)
            except PeerError as error:
                # The room that records promise may be gone; that of another answer will be there again.
                if not (error.busy and self._running):
                    raise


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with; every prompt keeps at least one token of its own, whose row predicts the first."""
    shared = prompts[0][:-1]
    for prompt in prompts[1:]:
        shared = shared[: common_prefix(shared, prompt[:-1])]
    return list(shared)
