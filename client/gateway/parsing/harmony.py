"""gpt-oss's harmony format: every part is a message of its own, with a header that says what it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .part import Part, joined
from .scanner import MarkScanner

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|start|>", "<|call|>", "<|return|>")
HARMONY_MARKS = (*_ENDS, "<|constrain|>")
_TOOL = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser:
    """`analysis` is reasoning, `final` is text, a message to a function is a call."""

    def __init__(self) -> None:
        self._scanner = MarkScanner()
        # None between messages, where headers stand.
        self._kind: str | None = None
        self._header = ""

    def feed(self, text: str) -> list[Part]:
        self._scanner.add(text)
        return joined(self._parts())

    def close(self) -> list[Part]:
        rest = self._scanner.flush()
        return joined([self._said(rest)] if self._kind else [])

    def _parts(self) -> Iterator[Part]:
        while True:
            text, mark = self._scanner.next((_MESSAGE, *_ENDS) if self._kind is None else _ENDS)
            if self._kind is None:
                self._header += text
                if mark == _MESSAGE:
                    yield from self._begin()
                elif mark is not None:
                    self._header = ""
            else:
                yield self._said(text)
                if mark is not None:
                    self._kind, self._header = None, ""
            if mark is None:
                return

    def _begin(self) -> Iterator[Part]:
        header = self._header
        channel = header.partition(_CHANNEL)[2].split("<")[0].split()
        tool = _TOOL.search(header)
        if tool:
            self._kind = "arguments"
            yield Part("call", tool.group(1))
        else:
            self._kind = "reasoning" if channel[:1] == ["analysis"] else "text"

    def _said(self, text: str) -> Part:
        if self._kind == "arguments":
            return Part("arguments", text)
        return Part("reasoning" if self._kind == "reasoning" else "text", text)
