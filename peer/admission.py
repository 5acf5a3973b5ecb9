"""Who may open a session: reservations against the pool, so that nothing started can run out of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .pool import PAGE


class Refused(Exception):
    """No room; the message says what is free and when to try again. `final`: there never will be."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass
class Admission:
    """Counts sessions and reserved pages. Forks reserve in full, though they share: their pages may all be copied."""

    n_pages: int
    max_sessions: int
    retry_s: float = 2.0
    _pages: dict[bytes, int] = field(default_factory=dict)

    @property
    def sessions(self) -> int:
        return len(self._pages)

    @property
    def free_tokens(self) -> int:
        return (self.n_pages - sum(self._pages.values())) * PAGE

    def reserve(self, session: bytes, tokens: int) -> None:
        """Raises Refused, and reserves nothing, where the session does not fit."""
        assert session not in self._pages
        pages = math.ceil(tokens / PAGE)
        if pages > self.n_pages:
            raise Refused(
                f"{tokens} tokens never fit this peer's cache of {self.n_pages * PAGE}; ask for fewer", final=True
            )
        if len(self._pages) >= self.max_sessions:
            raise Refused(f"all {self.max_sessions} sessions are taken; retry in {self.retry_s:g} s")
        if pages * PAGE > self.free_tokens:
            raise Refused(
                f"{tokens} cache tokens asked, {self.free_tokens} of {self.n_pages * PAGE} free; "
                f"retry in {self.retry_s:g} s or ask for fewer"
            )
        self._pages[session] = pages

    def release(self, session: bytes) -> None:
        self._pages.pop(session, None)
