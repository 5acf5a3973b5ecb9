"""One choice as it is read: chunks of the model's words in, events out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from ..output import OutputChunk
from .events import CallArguments, CallBegin, Finish, FinishReason, Reasoning, Said, Text
from .parsing.parser import Parser
from .parsing.part import Part

_FINISH: dict[str, FinishReason] = {"length": "length", "time": "length"}


class Reading:
    """`finished` once the choice is complete; with `one_call` that is where a second call would begin."""

    def __init__(self, choice: int, parser: Parser, one_call: bool) -> None:
        self.finished = False
        self._choice = choice
        self._parser = parser
        self._one_call = one_call
        self._calls = 0

    def take(self, chunk: OutputChunk) -> Iterator[Said | Finish]:
        yield from self._said(self._parser.feed(chunk.text))
        if chunk.finish_reason and not self.finished:
            yield from self._said(self._parser.close())
        if chunk.finish_reason and not self.finished:
            yield self._finish(_FINISH.get(chunk.finish_reason, "stop"), chunk.stop_string)

    def _said(self, parts: Sequence[Part]) -> Iterator[Said | Finish]:
        for part in parts:
            if part.kind == "call":
                if self._one_call and self._calls:
                    yield self._finish("stop", None)
                    return
                self._calls += 1
                yield CallBegin(self._choice, self._calls - 1, f"call_{secrets.token_hex(12)}", part.text)
            elif part.kind == "arguments":
                yield CallArguments(self._choice, self._calls - 1, part.text)
            elif part.kind == "reasoning":
                yield Reasoning(self._choice, part.text)
            else:
                yield Text(self._choice, part.text)

    def _finish(self, reason: FinishReason, stop: str | None) -> Finish:
        self.finished = True
        return Finish(self._choice, "tool_calls" if self._calls and reason == "stop" else reason, stop)
