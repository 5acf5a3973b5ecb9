"""The state machine: a model's words in, text, reasoning and calls out, the same however the words are cut.

A round of drafting brings several tokens at once: nothing here counts on pieces being single tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

from .formats import SILENT_MARKS, CallFormat, ReasoningFormat
from .named_calls import IsText
from .part import CallReader, Part, joined
from .scanner import MarkScanner

# Parts, and at the end whether there may be more to be had of what was said so far.
Steps = Generator[Part, None, bool]
# What stands between calls that no mark opens.
_BETWEEN_CALLS = " \n\t;"


class Parser(Protocol):
    """Parts of one answer; parts of one kind that follow each other belong together."""

    def feed(self, text: str) -> list[Part]: ...

    def close(self) -> list[Part]:
        """At the end of the answer: whatever was held back."""


class PlainParser:
    """Everything is text."""

    def feed(self, text: str) -> list[Part]:
        return joined([Part("text", text)])

    def close(self) -> list[Part]:
        return []


class MarkParser:
    """Models that mark reasoning and calls within one message."""

    def __init__(
        self,
        calls: CallFormat | None,
        reasoning: ReasoningFormat | None,
        is_text: IsText = lambda tool, argument: False,
        reasons: bool = False,
    ) -> None:
        """`calls`: None where there are no tools. `reasons`: the prompt ends with the mark that opens reasoning."""
        self._calls = calls
        self._reasoning = reasoning
        self._is_text = is_text
        self._in_reasoning = reasons and reasoning is not None
        self._scanner = MarkScanner()
        self._reader: CallReader | None = None
        self._opened = self._block = ""
        self._called = False
        # Whether nothing but white space has been said.
        self._at_start = True
        self._trims = self._in_reasoning
        self._space = ""

    def feed(self, text: str) -> list[Part]:
        self._scanner.add(text)
        return joined(self._parts())

    def close(self) -> list[Part]:
        rest = self._scanner.flush()
        if self._in_reasoning:
            return joined([Part("reasoning", self._trimmed(rest))])
        parts = [*self._read(self._reader, rest), *self._end_block(self._reader, "")] if self._reader else []
        return joined([*parts, Part("text", self._spoken("" if parts else rest)), Part("text", self._space)])

    def _parts(self) -> Iterator[Part]:
        gets_on = True
        while gets_on:
            if self._reader:
                gets_on = yield from self._in_block(self._reader)
            elif self._in_reasoning:
                gets_on = yield from self._in_thought()
            else:
                gets_on = yield from self._in_text()

    def _in_text(self) -> Steps:
        calls, reasoning = self._calls, self._reasoning
        marks = [*((*calls.opens, calls.closes, *SILENT_MARKS) if calls else ())]
        text, mark = self._scanner.next([*marks, *([reasoning.opens] if reasoning else ())])
        if calls and calls.bare and self._at_start:
            beginning = text.lstrip(_BETWEEN_CALLS)
            if beginning.startswith("{"):
                self._scanner.put_back(beginning + (mark or ""))
                self._begin_block("")
                return True
            if not beginning and mark is None:  # what comes next tells what this is
                self._scanner.put_back(text)
                return False
        yield Part("text", self._spoken(text))
        if mark is None:
            return False
        if reasoning and mark == reasoning.opens:
            self._in_reasoning = self._trims = True
        elif calls and mark in calls.opens:
            self._begin_block(mark)
        return True

    def _in_thought(self) -> Steps:
        assert self._reasoning
        text, mark = self._scanner.next([self._reasoning.closes])
        yield Part("reasoning", self._trimmed(text))
        if mark is None:
            return False
        self._in_reasoning, self._trims = False, True
        return True

    def _in_block(self, reader: CallReader) -> Steps:
        assert self._calls
        text, mark = self._scanner.next([self._calls.closes])
        yield from self._read(reader, text)
        if reader.ended:
            self._block = self._block[: len(self._block) - len(reader.rest)]
            self._scanner.put_back(reader.rest + (mark or ""))
            yield from self._end_block(reader, "")
            return True
        if mark is None:
            return False
        if reader.quoted:  # the mark is part of what is quoted
            yield from self._read(reader, mark)
        else:
            yield from self._end_block(reader, mark)
        return True

    def _read(self, reader: CallReader, text: str) -> Iterator[Part]:
        self._block += text
        for part in reader.feed(text):
            self._called = self._called or part.kind == "call"
            yield part

    def _begin_block(self, mark: str) -> None:
        assert self._calls
        self._reader = self._calls.reader(self._is_text)
        self._opened, self._block, self._called = mark, "", False

    def _end_block(self, reader: CallReader, mark: str) -> Iterator[Part]:
        """What turned out to be no call is text."""
        for part in reader.close():
            self._called = self._called or part.kind == "call"
            yield part
        if self._called:
            self._space, self._trims, self._at_start = "", True, True
        else:
            self._at_start = False
            yield Part("text", self._spoken(self._opened + self._block + mark))
        self._reader = None

    def _trimmed(self, text: str) -> str:
        """Without the line breaks that stand behind a mark."""
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text

    def _spoken(self, text: str) -> str:
        """Text to be given out; white space waits where a call may follow, which it would be no part of."""
        text = self._space + self._trimmed(text)
        self._space = ""
        if self._calls:
            kept = text.rstrip()
            text, self._space = kept, text[len(kept) :]
        self._at_start = self._at_start and not text
        return text
