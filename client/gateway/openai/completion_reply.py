"""POST /v1/completions: what is answered, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..events import Answer, Event, Finish, ScoredToken, Text, Tokens
from ..reply import Frame
from .usage import usage

Json = dict[str, Any]


class CompletionReply:
    """One request's answer in the shape of Completions. `top`: how many other tokens come with each, None for no
    scores at all; `echoed`: what each choice's text begins with."""

    def __init__(
        self, model: str, choices: int, top: int | None, echoed: Sequence[str] = (), includes_usage: bool = False
    ) -> None:
        self.answer = Answer.of(choices)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._top = top
        self._echoed = echoed
        self._includes_usage = includes_usage
        # Of each choice: what its text still begins with, and characters of tokens that are out already.
        self._unsaid = list(echoed) or [""] * choices
        self._offsets = [0] * choices

    def whole(self) -> Json:
        self._unsaid = list(self._echoed) or [""] * len(self._offsets)
        self._offsets = [0] * len(self._offsets)
        choices = [
            self._choice(at, each.text, each.tokens, each.finish.reason if each.finish else None)
            for at, each in enumerate(self.answer.choices)
        ]
        return {**self._head, "choices": choices, "usage": usage(self.answer)}

    def frames(self, event: Event) -> Iterator[Frame]:
        if isinstance(event, Tokens) and event.scored:
            yield self._frame(self._choice(event.choice, "", event.scored, None))
        elif isinstance(event, Text):
            yield self._frame(self._choice(event.choice, event.text, (), None))
        elif isinstance(event, Finish):
            yield self._frame(self._choice(event.choice, "", (), event.reason))

    def end(self) -> Iterator[Frame]:
        if self._includes_usage:
            yield Frame({**self._head, "choices": [], "usage": usage(self.answer)})
        yield Frame("[DONE]")

    def _frame(self, choice: Json) -> Frame:
        return Frame({**self._head, "choices": [choice], **({"usage": None} if self._includes_usage else {})})

    def _choice(self, at: int, text: str, tokens: Sequence[ScoredToken], finish_reason: str | None) -> Json:
        text, self._unsaid[at] = self._unsaid[at] + text, ""
        logprobs = None if self._top is None or not tokens else self._scores(at, tokens, self._top)
        return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _scores(self, at: int, tokens: Sequence[ScoredToken], top: int) -> Json:
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[at])
            self._offsets[at] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{other.text: other.logprob for other in token.top[:top]} for token in tokens],
            "text_offset": offsets,
        }
