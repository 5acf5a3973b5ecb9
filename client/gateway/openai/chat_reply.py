"""POST /v1/chat/completions: what is answered, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..events import Answer, CallArguments, CallBegin, Choice, Event, Finish, Reasoning, ScoredToken, Text, Tokens
from ..reply import Frame
from .usage import usage

Json = dict[str, Any]


class ChatReply:
    """One request's answer in the shape of Chat Completions. `top`: how many other tokens come with each."""

    def __init__(self, model: str, choices: int, top: int, logprobs: bool, includes_usage: bool) -> None:
        self.answer = Answer.of(choices)
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._top = top
        self._logprobs = logprobs
        self._includes_usage = includes_usage
        self._silent = set(range(choices))

    def whole(self) -> Json:
        """The answer once it is complete."""
        choices = [self._whole_choice(at, choice) for at, choice in enumerate(self.answer.choices)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(self.answer)}

    def frames(self, event: Event) -> Iterator[Frame]:
        """What a stream says of an event."""
        if isinstance(event, Tokens) and event.scored:
            yield self._delta(event.choice, {}, self._scores(event.scored))
        elif isinstance(event, Text):
            yield self._delta(event.choice, {"content": event.text})
        elif isinstance(event, Reasoning):
            yield self._delta(event.choice, {"reasoning_content": event.text})
        elif isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.call, "id": event.id, "type": "function", "function": function}
            yield self._delta(event.choice, {"tool_calls": [call]})
        elif isinstance(event, CallArguments):
            call = {"index": event.call, "function": {"arguments": event.text}}
            yield self._delta(event.choice, {"tool_calls": [call]})
        elif isinstance(event, Finish):
            yield self._delta(event.choice, {}, None, event.reason)

    def end(self) -> Iterator[Frame]:
        """What a stream ends with."""
        if self._includes_usage:
            yield Frame({**self._chunk_head(), "choices": [], "usage": usage(self.answer)})
        yield Frame("[DONE]")

    def _delta(self, choice: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Frame:
        if choice in self._silent:
            self._silent.remove(choice)
            delta = {"role": "assistant", "content": "", **delta}
        said = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return Frame({**self._chunk_head(), "choices": [said], **({"usage": None} if self._includes_usage else {})})

    def _chunk_head(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk"}

    def _whole_choice(self, at: int, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.calls
            ]
        return {
            "index": at,
            "message": message,
            "logprobs": self._scores(choice.tokens) if self._logprobs else None,
            "finish_reason": choice.finish.reason if choice.finish else None,
        }

    def _scores(self, tokens: Sequence[ScoredToken]) -> Json:
        return {"content": [{**_score(t), "top_logprobs": [_score(o) for o in t.top[: self._top]]} for t in tokens]}


def _score(token: ScoredToken) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
