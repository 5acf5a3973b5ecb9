"""Sessions that outlive a request: a conversation that grows finds its own, and only what is new is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import GenerationConfig
from ..connection import TREE_ROOM
from ..generation import Generator, common_prefix
from ..session.options import Grammar
from ..session.peer_error import PeerError
from ..session.session import Session
from .pace import Pace

# Sessions that wait for their conversation to go on, and for how long.
MOST_IDLE = 32
IDLE_S = 300.0
# What a new session keeps room for beyond its request, where the peers have it to spare.
SPARE_TOKENS = 4096
# Shorter beginnings are not worth a session's while.
WORTH = 32


@dataclass
class _Idle:
    owner: str
    session: Session
    since: float


class SessionPool:
    """Sessions of one model. Whose text a session has seen is known by its `owner`: nobody else gets it, since how
    fast an answer begins would tell what others have said."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._pace = Pace()
        self._idle: list[_Idle] = []

    def __len__(self) -> int:
        return len(self._idle)

    async def take(self, owner: str, ids: Sequence[int], config: GenerationConfig, wait_s: float) -> Session:
        """A session for an answer to `ids` by `config`: one that holds their beginning, or a new one.

        Where peers have no room, those that wait here give way, the oldest first. Raises PeerError, NoRoute.
        """
        self._expire()
        reserve_tokens = len(ids) + config.max_new_tokens
        if found := self._best(owner, ids, reserve_tokens, self._generator.grammar(config)):
            self._idle.remove(found)
            return found.session
        reserve_tokens += TREE_ROOM
        spare = max(0, SPARE_TOKENS - reserve_tokens)
        while spare or self._idle:
            try:
                await self._pace.turn()
                return await self._generator.open_session(config, reserve_tokens, 0, spare)
            except PeerError as error:
                if not error.passing:
                    raise
            if not spare and self._idle:  # others may have taken the last one meanwhile
                self._idle.pop(0).session.close()
            spare = 0
        await self._pace.turn()
        return await self._generator.open_session(config, reserve_tokens, wait_s)

    async def fork(self, session: Session) -> Session:
        """Another one that holds the same. Raises PeerError."""
        await self._pace.turn()
        return await session.fork()

    def give_back(self, owner: str, session: Session) -> None:
        """Keep a session whose answer is complete, for what may come next."""
        self._idle.append(_Idle(owner, session, time.monotonic()))
        self._expire()

    def close(self) -> None:
        for idle in self._idle:
            idle.session.close()
        self._idle.clear()

    def _best(self, owner: str, ids: Sequence[int], reserve_tokens: int, grammar: Grammar | None) -> _Idle | None:
        """The session with the longest common beginning; none where it would lose more than it brings."""
        best, most = None, 0
        for idle in self._idle:
            held = idle.session.ids
            room = min(idle.session.context_length, idle.session.options.reserve_tokens)
            if (idle.owner, idle.session.options.grammar) != (owner, grammar):
                continue
            if min(reserve_tokens, idle.session.context_length) > room:
                continue
            shared = common_prefix(held, ids)
            if shared > most and shared >= min(WORTH, len(held)) and 2 * shared >= len(held):
                best, most = idle, shared
        return best

    def _expire(self) -> None:
        limit = time.monotonic() - IDLE_S
        while self._idle and (len(self._idle) > MOST_IDLE or self._idle[0].since < limit):
            self._idle.pop(0).session.close()
