"""POST /v1/messages: what is asked. Fields that are not known here are passed over, as clients send them early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ...config import GenerationSettings
from ..body import Number, TolerantBody
from ..errors import bad_request
from ..functions import MOST_TOOLS, call, function
from ..generation_request import Conversation, GenerationRequest, Message

MOST_MESSAGES = 4096
MOST_TOKENS = 1 << 20


class Block(TolerantBody):
    """A piece of a message. Thinking that comes back is shown to templates that have a place for it."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None


class ApiMessage(TolerantBody):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(TolerantBody):
    """Those with a type of their own run at Anthropic, hence not here."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(TolerantBody):
    type: str
    disable_parallel_tool_use: bool | None = None


class Thinking(TolerantBody):
    type: str


class CountRequest(TolerantBody):
    """POST /v1/messages/count_tokens."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[ApiMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: str | list[Block] | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def conversation(self) -> Conversation:
        """Raises ApiError for what cannot be served."""
        choice = self.tool_choice
        if choice and choice.type not in ("auto", "none"):
            raise bad_request("tool_choice can be auto or none", "tool_choice")
        tools = [] if choice and choice.type == "none" else self.tools or []
        system = _text(self.system or "", "system")
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        return Conversation(
            [*opening, *_messages(self.messages)],
            [
                function(tool.name, tool.description, tool.input_schema)
                for tool in tools
                if tool.name and tool.type in (None, "custom")
            ],
            {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"},
            goes_on=self.messages[-1].role == "assistant",
            one_call=bool(choice and choice.disable_parallel_tool_use),
        )


class MessagesRequest(CountRequest):
    """`seed` is beyond Anthropic's API: without one every answer differs."""

    max_tokens: int = Field(ge=1, le=MOST_TOKENS)
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=0, lt=1 << 32)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=512)]] | None = Field(None, max_length=64)
    stream: bool | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 64)

    def generation_request(self) -> GenerationRequest:
        """Raises ApiError for what cannot be served."""
        settings: GenerationSettings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop_strings": self.stop_sequences or None,
        }
        return GenerationRequest(self.model, [self.conversation()], settings, self.max_tokens)


def _messages(messages: Sequence[ApiMessage]) -> Iterator[Message]:
    for at, message in enumerate(messages):
        where = f"messages.{at}.content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content, where)
        else:
            results = [block for block in message.content if block.type == "tool_result"]
            for block in results:
                content = _text(block.content or "", where)
                yield {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content}
            others = [block for block in message.content if block.type != "tool_result"]
            if others or not results:
                yield {"role": message.role, "content": _text(others, where)}


def _assistant(blocks: Sequence[Block], where: str) -> Message:
    calls = [call(block.id or "", block.name or "", block.input or {}) for block in blocks if block.type == "tool_use"]
    thought = "".join(block.thinking or "" for block in blocks)
    said = [block for block in blocks if block.type not in ("tool_use", "thinking", "redacted_thinking")]
    message: dict[str, Any] = {"role": "assistant", "content": _text(said, where)}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: str | Sequence[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise bad_request(f"content of type {block.type[:40]!r} is not supported, text is", where)
    return "".join(block.text or "" for block in content)
