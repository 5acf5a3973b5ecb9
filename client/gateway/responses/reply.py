"""POST /v1/responses: what is answered, whole or as a stream of numbered events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..blocks import Block, Blocks, BlockStep
from ..events import Answer, Begin, Event
from ..reply import Frame
from .request import ResponsesRequest

Json = dict[str, Any]
# Hears a response's id, and what it says.
Completed = Callable[[str, Blocks], None]


class ResponsesReply:
    """One response; `complete` hears of it once it is."""

    def __init__(
        self, asked: ResponsesRequest, complete: Callable[[str, Blocks], None] = lambda id, blocks: None
    ) -> None:
        self.answer = Answer.of(1)
        self.id = f"resp_{secrets.token_hex(16)}"
        self._asked = asked
        self._complete = complete
        self._blocks = Blocks()
        self._ids: list[str] = []
        self._created = int(time.time())
        self._number = 0
        self._begun = False

    def whole(self) -> Json:
        self._complete(self.id, self._blocks)
        return self._response(self._status())

    def frames(self, event: Event) -> Iterator[Frame]:
        if isinstance(event, Begin):
            yield from self._begin()
        for step in self._blocks.add(event):
            yield from self._step_frames(step)

    def end(self) -> Iterator[Frame]:
        yield from self._begin()
        status = self._status()
        self._complete(self.id, self._blocks)
        yield self._frame(f"response.{status}", response=self._response(status))

    def _begin(self) -> Iterator[Frame]:
        if not self._begun:
            self._begun = True
            yield self._frame("response.created", response=self._response("in_progress"))
            yield self._frame("response.in_progress", response=self._response("in_progress"))

    def _frame(self, kind: str, **said: Any) -> Frame:
        self._number += 1
        return Frame({"type": kind, "sequence_number": self._number - 1, **said}, kind)

    def _step_frames(self, step: BlockStep) -> Iterator[Frame]:
        block = step.block
        at = block.index
        if step.what == "open":
            self._ids.append(f"{_PREFIX[block.kind]}_{secrets.token_hex(16)}")
            yield self._frame("response.output_item.added", output_index=at, item=self._item(block, "in_progress"))
        place: Json = {"item_id": self._ids[at], "output_index": at}
        if block.kind != "call":
            place["content_index"] = 0
        name = _NAMES[block.kind]
        if step.what == "open" and block.kind == "text":
            yield self._frame("response.content_part.added", **place, part=_part(""))
        elif step.what == "more":
            yield self._frame(f"response.{name}.delta", **place, delta=step.text, **_scores(block))
        elif step.what == "close":
            whole = "arguments" if block.kind == "call" else "text"
            yield self._frame(f"response.{name}.done", **place, **{whole: block.text}, **_scores(block))
            if block.kind == "text":
                yield self._frame("response.content_part.done", **place, part=_part(block.text))
            yield self._frame("response.output_item.done", output_index=at, item=self._item(block, "completed"))

    def _item(self, block: Block, status: str) -> Json:
        id, text = self._ids[block.index], block.text if status == "completed" else ""
        if block.kind == "call":
            named = {"id": id, "type": "function_call", "call_id": block.id, "name": block.name}
            return {**named, "arguments": text, "status": status}
        if block.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}
        content = [_part(text)] if status == "completed" else []
        return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _status(self) -> str:
        finish = self.answer.choices[0].finish
        return "incomplete" if finish and finish.reason == "length" else "completed"

    def _response(self, status: str) -> Json:
        asked, done = self._asked, status != "in_progress"
        output = [self._item(block, "completed") for block in self._blocks.blocks] if done else []
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "metadata": asked.metadata or {},
        }

    def _usage(self) -> Json:
        answer = self.answer
        return {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }


_PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}
_NAMES = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _scores(block: Block) -> Json:
    return {"logprobs": []} if block.kind == "text" else {}
