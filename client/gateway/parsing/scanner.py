"""Finds marks in a text that comes in pieces, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Iterable


class MarkScanner:
    """Holds back what may turn out to be the beginning of a mark."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> None:
        self._held += text

    def next(self, marks: Iterable[str]) -> tuple[str, str | None]:
        """The text up to the first of the marks, and which; or all that is surely no part of one, and None."""
        marks = [mark for mark in marks if mark]
        places = [(at, -len(mark), mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if places:
            at, _, mark = min(places)
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            return before, mark
        cut = len(self._held) - max((self._begun(mark) for mark in marks), default=0)
        before, self._held = self._held[:cut], self._held[cut:]
        return before, None

    def put_back(self, text: str) -> None:
        self._held = text + self._held

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _begun(self, mark: str) -> int:
        """Length of the longest beginning of a mark that the text ends with."""
        longest = min(len(mark) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(mark[:size])), 0)
