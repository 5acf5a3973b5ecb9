"""POST /v1/responses: what is asked. Fields, items and tools that are not known here are passed over: agents send
them to whoever listens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from ...config import GenerationSettings
from ..body import Number, TolerantBody
from ..errors import bad_request
from ..formats import schema_settings
from ..functions import MOST_TOOLS, call, function
from ..generation_request import Conversation, GenerationRequest, Message

MOST_ITEMS = 4096


class Part(TolerantBody):
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(TolerantBody):
    """A message, a call, what came of one, or reasoning that comes back."""

    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class Tool(TolerantBody):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class TextFormat(TolerantBody):
    type: str = "text"
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class TextOptions(TolerantBody):
    format: TextFormat | None = None


class ReasoningOptions(TolerantBody):
    effort: str | None = Field(None, max_length=32)


class ResponsesRequest(TolerantBody):
    """`seed` is beyond OpenAI's API: without one every answer differs."""

    model: str = Field(min_length=1, max_length=512)
    input: str | Annotated[list[Item], Field(max_length=MOST_ITEMS)] = ""
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    store: bool | None = None
    stream: bool | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 20)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
    background: bool | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 64)

    @property
    def asks_nothing(self) -> bool:
        """Agents probe so whether somebody is there."""
        return not self.input and self.previous_response_id is None

    def messages(self) -> list[Message]:
        """The input's own. Raises ApiError."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}] if self.input else []
        return list(_joined(_messages(self.input)))

    def generation_request(self, before: Sequence[Message]) -> GenerationRequest:
        """`before`: what was said up to the response that this one follows. Raises ApiError."""
        if self.background:
            raise bad_request("background=true is not supported", "background")
        if self.tool_choice not in (None, "auto", "none"):
            raise bad_request("tool_choice can be auto or none", "tool_choice")
        offered = [] if self.tool_choice == "none" else self.tools or []
        format = self.text.format if self.text and self.text.format else TextFormat()
        settings: GenerationSettings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            **schema_settings(format.type, format.schema_, "text.format"),
        }
        opening: list[Message] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = self.reasoning.effort if self.reasoning else None
        conversation = Conversation(
            _with_one_system([*opening, *before, *self.messages()]),
            [function(t.name, t.description, t.parameters) for t in offered if t.type == "function" and t.name],
            {"reasoning_effort": effort} if effort else {},
            one_call=self.parallel_tool_calls is False,
        )
        return GenerationRequest(self.model, [conversation], settings, self.max_output_tokens)


def _messages(items: Sequence[Item]) -> Iterator[Message]:
    for at, item in enumerate(items):
        where = f"input.{at}"
        if item.type == "message":
            role = {"developer": "system"}.get(item.role or "", item.role or "user")
            if role not in ("system", "user", "assistant"):
                raise bad_request(f"a message of role {role[:40]!r} is not known", f"{where}.role")
            yield {"role": role, "content": _text(item.content, where)}
        elif item.type == "function_call":
            made = call(item.call_id or "", item.name or "", item.arguments or "{}")
            yield {"role": "assistant", "content": "", "tool_calls": [made]}
        elif item.type == "function_call_output":
            yield {"role": "tool", "tool_call_id": item.call_id or "", "content": _text(item.output, where)}


def _joined(messages: Iterator[Message]) -> Iterator[Message]:
    """Calls belong to the assistant's message before them."""
    held: dict[str, Any] | None = None
    for message in messages:
        if held and message["role"] == "assistant" and not message["content"]:
            held["tool_calls"] = [*held.get("tool_calls", ()), *message.get("tool_calls", ())]
            continue
        if held:
            yield held
        held = dict(message) if message["role"] == "assistant" else None
        if held is None:
            yield message
    if held:
        yield held


def _with_one_system(messages: Sequence[Message]) -> list[Message]:
    """Many templates take a single message of the system, at the beginning."""
    at = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    words = "\n\n".join(str(message["content"]) for message in messages[:at])
    return [*([{"role": "system", "content": words}] if words else []), *messages[at:]]


def _text(content: str | Sequence[Part] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("input_text", "output_text", "text", "refusal", "summary_text"):
            raise bad_request(f"content of type {part.type[:40]!r} is not supported, text is", f"{where}.content")
    return "".join(part.text or part.refusal or "" for part in content)
