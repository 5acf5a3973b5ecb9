"""Tools for models whose chat template knows none: told in words, and answered in the format that most models know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .generation_request import Message

_HEAD = "You can call these functions:"
_FOOT = (
    "To call one, answer with nothing but its name and arguments, and wait for the result:\n"
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
)


def told(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same conversation without tools: they, their calls and results stand in ordinary messages."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    words = "\n".join([_HEAD, *lines, _FOOT]) if tools else ""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    rest = messages[1:] if first else messages
    system = "\n\n".join(filter(None, [first["content"] if first else "", words]))
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*opening, *_plain(rest)]


def _plain(messages: Sequence[Message]) -> Iterator[Message]:
    for message in messages:
        if message["role"] in ("tool", "function"):
            yield {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        elif message.get("tool_calls"):
            calls = (json.dumps(_called(call), ensure_ascii=False) for call in message["tool_calls"])
            blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
            yield {"role": "assistant", "content": "\n".join(filter(None, [message["content"], *blocks]))}
        else:
            yield message


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
