"""POST /api/chat and /api/generate: what is answered, whole or line by line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from ..events import Answer, Begin, Call, CallBegin, Event, Finish, Reasoning, Text
from ..functions import arguments_of
from ..reply import Frame

Json = dict[str, Any]


class OllamaReply:
    """One answer; `chats` tells the two ways to ask apart. Calls come whole, as clients expect them.

    `loads`: nothing was asked, but that the model be there.
    """

    def __init__(self, model: str, chats: bool, loads: bool) -> None:
        self.answer = Answer.of(1)
        self._model = model
        self._chats = chats
        self._loads = loads
        self._started = self._begun = time.monotonic_ns()
        # Calls that are out already.
        self._told = 0

    def whole(self) -> Json:
        choice = self.answer.choices[0]
        return self._last(self._said(choice.text, choice.reasoning, choice.calls))

    def frames(self, event: Event) -> Iterator[Frame]:
        if isinstance(event, Begin):
            self._begun = time.monotonic_ns()
        elif isinstance(event, Text):
            yield Frame(self._line(self._said(event.text)))
        elif isinstance(event, Reasoning):
            yield Frame(self._line(self._said("", event.text)))
        elif isinstance(event, (CallBegin, Finish)):
            # A call is complete where the next one, or the end, comes.
            calls = self.answer.choices[0].calls
            for call in calls[self._told : len(calls) - isinstance(event, CallBegin)]:
                self._told += 1
                yield Frame(self._line(self._said("", "", [call])))

    def end(self) -> Iterator[Frame]:
        yield Frame(self._last(self._said("")))

    def _line(self, said: Json) -> Json:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": now, **said, "done": False}

    def _last(self, said: Json) -> Json:
        if self._loads:
            return {**self._line(said), "done": True, "done_reason": "load"}
        answer, now = self.answer, time.monotonic_ns()
        finish = answer.choices[0].finish
        return {
            **self._line(said),
            "done": True,
            "done_reason": "length" if finish and finish.reason == "length" else "stop",
            "total_duration": now - self._started,
            "load_duration": 0,
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": self._begun - self._started,
            "eval_count": answer.completion_tokens,
            "eval_duration": now - self._begun,
        }

    def _said(self, text: str, thinking: str = "", calls: list[Call] | tuple[Call, ...] = ()) -> Json:
        if not self._chats:
            return {"response": text, **({"thinking": thinking} if thinking else {})}
        message: Json = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": arguments_of(call.arguments)}} for call in calls
            ]
        return {"message": message}
