"""Who may open a session: reservations against the KV cache, so that nothing started can run out of memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..engine.page_table import PAGE
from .refused import Refused

# Who was refused is taken to wait for so long.
PATIENCE_S = 10.0
# A session in which nothing happened for so long gives way to others; its client resumes by replay.
GIVE_WAY_S = 10.0


@dataclass(frozen=True)
class _Held:
    """What one session holds."""

    pages: int
    share: str


@dataclass
class Admission:
    """Counts sessions and reserved pages. Forks reserve in full, though they share: their pages may all be copied.

    Where a lab was refused for lack of room, none that holds more than its fair share (by weight, among the labs that
    hold or want something) gets more until that lab has come in, or has stopped asking. In a public swarm each client
    is a lab. Sessions give way before anybody is refused: see `giving_way`.
    """

    n_pages: int
    max_sessions: int
    retry_s: float = 2.0
    _held: dict[bytes, _Held] = field(default_factory=dict)
    _weights: dict[str, float] = field(default_factory=dict)
    _refused_at: dict[str, float] = field(default_factory=dict)

    @property
    def sessions(self) -> int:
        return len(self._held)

    @property
    def free_tokens(self) -> int:
        return (self.n_pages - sum(held.pages for held in self._held.values())) * PAGE

    def reserve(self, session: bytes, tokens: int, share: str = "", weight: float = 1.0) -> None:
        """Raises Refused, and reserves nothing, where the session does not fit."""
        assert session not in self._held
        pages = math.ceil(tokens / PAGE)
        if pages > self.n_pages:
            raise Refused(
                f"{tokens} tokens never fit this peer's cache of {self.n_pages * PAGE}; ask for fewer", final=True
            )
        self._weights[share] = weight
        self._forget(share)
        try:
            self._check(pages, tokens, share)
        except Refused:
            self._refused_at[share] = time.monotonic()
            raise
        self._refused_at.pop(share, None)
        self._held[session] = _Held(pages, share)

    def release(self, session: bytes) -> None:
        self._held.pop(session, None)

    def giving_way(self, tokens: int, share: str, idle_s: Mapping[bytes, float]) -> list[bytes]:
        """The sessions that end for one that was refused; none where that would not make room enough.

        First those that were idle for longest. Whoever holds nothing yet also gets in at the cost of who holds more
        than its share: of its sessions those in which least happens. `idle_s`: seconds, by session.
        """
        pages, mine = math.ceil(tokens / PAGE), self._pages_of(share)
        if mine and self._others_wait(share) and not self._is_fair(pages, share):
            return []
        lacking = max(0, pages - self.free_tokens // PAGE)
        seats = max(0, len(self._held) + 1 - self.max_sessions)
        chosen: list[bytes] = []
        for session in sorted(idle_s.keys() & self._held.keys(), key=lambda session: -idle_s[session]):
            if lacking <= 0 and seats <= 0:
                break
            if idle_s[session] < GIVE_WAY_S and (mine or not self._is_surplus(session, share, chosen)):
                continue
            chosen.append(session)
            lacking -= self._held[session].pages
            seats -= 1
        return chosen if lacking <= 0 and seats <= 0 else []

    def _is_surplus(self, session: bytes, asking: str, ended: list[bytes]) -> bool:
        """Whether the session's owner would hold its share without it, once the others have `ended`."""
        held = self._held[session]
        left = [s for s, other in self._held.items() if other.share == held.share and s not in (session, *ended)]
        part = self._weights[held.share] / sum(self._weights.values())
        enough = len(left) >= part * self.max_sessions or sum(self._held[s].pages for s in left) >= part * self.n_pages
        return held.share != asking and bool(left) and enough

    def _pages_of(self, share: str) -> int:
        return sum(held.pages for held in self._held.values() if held.share == share)

    def _others_wait(self, share: str) -> bool:
        return bool(self._refused_at.keys() - {share})

    def _check(self, pages: int, tokens: int, share: str) -> None:
        if len(self._held) >= self.max_sessions:
            raise Refused(f"all {self.max_sessions} sessions are taken; retry in {self.retry_s:g} s")
        if pages * PAGE > self.free_tokens:
            raise Refused(
                f"{tokens} cache tokens asked, {self.free_tokens} of {self.n_pages * PAGE} free; "
                f"retry in {self.retry_s:g} s or ask for fewer"
            )
        if self._others_wait(share) and not self._is_fair(pages, share):
            raise Refused(f"you hold your fair share and others wait; retry in {self.retry_s:g} s")

    def _is_fair(self, pages: int, share: str) -> bool:
        """Whether a lab would hold no more than its part of the sessions and pages, one session being always fair."""
        mine = [held.pages for held in self._held.values() if held.share == share]
        part = self._weights[share] / sum(self._weights.values())
        return not mine or (len(mine) < part * self.max_sessions and sum(mine) + pages <= part * self.n_pages)

    def _forget(self, asking: str) -> None:
        """Who has not asked again for a while wants nothing any more."""
        limit = time.monotonic() - PATIENCE_S
        self._refused_at = {share: at for share, at in self._refused_at.items() if at > limit}
        present = {held.share for held in self._held.values()} | self._refused_at.keys() | {asking}
        self._weights = {share: weight for share, weight in self._weights.items() if share in present}
