"""Many answers at a time: what their prompts share is computed once, and no more of them run than the peers hold."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from .config import GenerationConfig
from .connection import TREE_ROOM
from .generation import Generator, common_prefix
from .output import OutputChunk
from .session.peer_error import PeerError
from .session.session import Session

# Shorter beginnings are not worth the wait until the trunk is there.
SHARED_PREFIX = 32
T = TypeVar("T")


async def answers(
    generator: Generator, prompts: Sequence[Sequence[int]], n: int, config: GenerationConfig
) -> list[list[list[OutputChunk]]]:
    """`n` answers to each prompt; as many run at a time as fit. Where one fails, the others are given up.

    What all prompts begin with is computed once, where the peers have room for it beside; their sessions fork behind.
    Raises ValueError, PeerError, NoRoute.
    """
    batch = _Batch(generator, max(len(ids) + config.new_tokens(len(ids)) for ids in prompts) + TREE_ROOM)
    configs = [replace(config, sequence=i) for i in range(n)]
    shared = shared_prefix(prompts) if len(prompts) * n > 1 else []
    try:
        await batch.start(shared if len(shared) >= (1 if n > 1 else SHARED_PREFIX) else [])
        found = await all_or_none(batch.answer(ids, each) for ids in prompts for each in configs)
    finally:
        batch.close()
    return [found[i : i + n] for i in range(0, len(found), n)]


class _Batch:
    """Sessions of one call, each of `reserve` tokens."""

    def __init__(self, generator: Generator, reserve: int) -> None:
        self._generator = generator
        self._reserve = reserve
        self._trunk: Session | None = None
        self._slots = asyncio.Semaphore(1)
        self._running = 0

    async def start(self, shared: Sequence[int]) -> None:
        """See what fits; compute what the prompts share."""
        fit = await self._generator.connection.sessions_that_fit(self._reserve)
        if shared and fit > 1:
            self._trunk = await self._generator.connection.open_session(self._reserve)
            await self._trunk.prefill(shared)
            fit -= 1
        self._slots = asyncio.Semaphore(max(1, fit))

    async def answer(self, ids: Sequence[int], config: GenerationConfig) -> list[OutputChunk]:
        """One answer, as soon as there is room."""
        async with self._slots:
            session = await self._session()
            self._running += 1
            try:
                return [chunk async for chunk in await self._generator.chunks(session, ids, config)]
            finally:
                self._running -= 1
                session.close()

    def close(self) -> None:
        """Release what the answers shared."""
        if self._trunk:
            self._trunk.close()

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
                return await self._generator.connection.open_session(self._reserve)
            except PeerError as error:
                # The room that records promise may be gone; that of another answer will be there again.
                if not (error.busy and self._running):
                    raise


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; where one fails the others are cancelled, and over before the first error is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with; every prompt keeps at least one token of its own, whose row predicts the first."""
    shared = prompts[0][:-1]
    for prompt in prompts[1:]:
        shared = shared[: common_prefix(shared, prompt[:-1])]
    return list(shared)
