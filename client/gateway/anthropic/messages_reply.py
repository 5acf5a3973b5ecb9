"""POST /v1/messages: what is answered, whole or as a stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from ..blocks import Block, Blocks, BlockStep
from ..events import Answer, Begin, Event, FinishReason
from ..functions import arguments_of
from ..reply import Frame

Json = dict[str, Any]

_STOP: dict[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class MessagesReply:
    """One message."""

    def __init__(self, model: str) -> None:
        self.answer = Answer.of(1)
        self._blocks = Blocks()
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}

    def whole(self) -> Json:
        content = [_whole_block(block) for block in self._blocks.blocks]
        return {**self._head, "content": content, **self._stop(), "usage": self._usage()}

    def frames(self, event: Event) -> Iterator[Frame]:
        if isinstance(event, Begin):
            open_ended: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
            yield _frame("message_start", message={**self._head, **open_ended})
        for step in self._blocks.add(event):
            yield from _block_frames(step)

    def end(self) -> Iterator[Frame]:
        yield _frame("message_delta", delta=self._stop(), usage=self._usage())
        yield _frame("message_stop")

    def _stop(self) -> Json:
        finish = self.answer.choices[0].finish
        if finish is None:
            return {"stop_reason": None, "stop_sequence": None}
        reason = "stop_sequence" if finish.stop is not None else _STOP[finish.reason]
        return {"stop_reason": reason, "stop_sequence": finish.stop}

    def _usage(self) -> Json:
        answer = self.answer
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_read_input_tokens": answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.completion_tokens,
        }


def _frame(kind: str, **said: Any) -> Frame:
    return Frame({"type": kind, **said}, kind)


def _block_frames(step: BlockStep) -> Iterator[Frame]:
    block, at = step.block, step.block.index
    if step.what == "open":
        yield _frame("content_block_start", index=at, content_block=_empty_block(block))
    elif step.what == "more":
        yield _frame("content_block_delta", index=at, delta=_delta(block, step.text))
    else:
        if block.kind == "reasoning":
            yield _frame("content_block_delta", index=at, delta={"type": "signature_delta", "signature": ""})
        yield _frame("content_block_stop", index=at)


def _delta(block: Block, text: str) -> Json:
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _empty_block(block: Block) -> Json:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole_block(block: Block) -> Json:
    filled = {"call": "input", "reasoning": "thinking", "text": "text"}[block.kind]
    return {**_empty_block(block), filled: arguments_of(block.text) if block.kind == "call" else block.text}
