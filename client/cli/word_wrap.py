"""Breaks lines of streamed text between words, as a terminal does not."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PART = re.compile(r"\n|[^\S\n]+|\S+")


class WordWrap:
    """Text in as it comes, text out with line ends where the next word would not fit; an unfinished word waits."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""
        self._space = ""

    def add(self, text: str) -> str:
        """What can be printed now."""
        parts = _PART.findall(self._word + text)
        self._word = parts.pop() if parts and not parts[-1].isspace() and cell_len(parts[-1]) < self._width else ""
        return "".join(map(self._place, parts))

    def flush(self) -> str:
        """What is left at the end."""
        word, self._word = self._word, ""
        return self._place(word) if word else ""

    def _place(self, part: str) -> str:
        if part == "\n":
            self._column, self._space = 0, ""
            return "\n"
        if part.isspace():
            self._space += part
            return ""
        space, self._space = self._space, ""
        needed = cell_len(space) + cell_len(part)
        if self._column and self._column + needed > self._width:
            self._column = cell_len(part) % self._width
            return f"\n{part}"
        self._column = (self._column + needed) % self._width
        return space + part
