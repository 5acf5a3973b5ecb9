"""Messages of Chat Completions, as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..body import TolerantBody
from ..errors import bad_request
from ..functions import call
from ..generation_request import Message

MOST_MESSAGES = 4096


class ContentPart(TolerantBody):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(TolerantBody):
    name: str
    arguments: str = "{}"


class ToolCall(TolerantBody):
    id: str | None = None
    type: str = "function"
    function: FunctionCall | None = None


class ChatMessage(TolerantBody):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Raises ApiError for what no template takes, such as images."""
    return [_template_message(message, at) for at, message in enumerate(messages)]


def _template_message(message: ChatMessage, at: int) -> Message:
    role = "system" if message.role == "developer" else message.role
    said: dict[str, Any] = {"role": role, "content": _text(message.content, f"messages.{at}.content")}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            said[name] = value
    if message.tool_calls:
        said["tool_calls"] = [_call(each, f"messages.{at}.tool_calls") for each in message.tool_calls]
    return said


def _text(content: str | Sequence[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "refusal"):
            raise bad_request(f"content of type {part.type[:40]!r} is not supported, text is", where)
    return "".join(part.text or part.refusal or "" for part in content)


def _call(made: ToolCall, where: str) -> dict[str, Any]:
    if made.function is None:
        raise bad_request(f"a tool call of type {made.type[:40]!r} is not supported, function is", where)
    return call(made.id or "", made.function.name, made.function.arguments)
