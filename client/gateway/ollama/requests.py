"""POST /api/chat and /api/generate: what is asked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...config import GenerationSettings
from ..body import Number, TolerantBody
from ..errors import bad_request
from ..formats import schema_settings
from ..functions import MOST_TOOLS, call, function
from ..generation_request import Conversation, GenerationRequest, Message

# What changes the text and is served with one value only.
_NEUTRAL: dict[str, Any] = {"typical_p": 1.0, "mirostat": 0, "num_keep": 0}


class Options(TolerantBody):
    """Of a model's run; those of Ollama's own machine (num_ctx, num_gpu, …) say nothing here."""

    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_k: int | None = Field(default=None, ge=0, lt=1 << 32)
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    stop: str | list[str] | None = Field(default=None, max_length=64)
    num_predict: int | None = Field(default=None, ge=-2, le=1 << 20)
    typical_p: Number | None = None
    mirostat: int | None = None
    num_keep: int | None = None

    def settings(self) -> GenerationSettings:
        """Raises ApiError for what cannot be served."""
        for name, value in _NEUTRAL.items():
            if getattr(self, name) not in (None, value):
                raise bad_request(f"options.{name}={getattr(self, name)!r:.40} is not supported", f"options.{name}")
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "seed": None if self.seed is None else self.seed % (1 << 64),
            "stop_strings": self.stop or None,
        }


class CalledFunction(TolerantBody):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(TolerantBody):
    function: CalledFunction


class ChatMessage(TolerantBody):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None

    def for_template(self, at: int) -> Message:
        if self.images:
            raise bad_request("images are not supported", f"messages.{at}.images")
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            said["reasoning_content"] = self.thinking
        if self.tool_name:
            said["name"] = self.tool_name
        if self.tool_calls:
            said["tool_calls"] = [call("", each.function.name, each.function.arguments) for each in self.tool_calls]
        return said


class OfferedFunction(TolerantBody):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(TolerantBody):
    type: str = "function"
    function: OfferedFunction


class RunFields(TolerantBody):
    """What both ways to ask have; `keep_alive` says nothing here, since peers keep models as they please."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None

    def _request(self, prompt: Conversation | str) -> GenerationRequest:
        options = self.options or Options()
        settings = options.settings()
        if self.format == "json":
            settings |= schema_settings("json_object", None, "format")
        elif self.format:
            settings |= schema_settings("json_schema", self.format, "format")
        tokens = options.num_predict
        return GenerationRequest(self.model, [prompt], settings, tokens if tokens and tokens > 0 else None)

    def _variables(self) -> dict[str, Any]:
        if self.think is None:
            return {}
        effort = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
        return {"enable_thinking": bool(self.think), **effort}


class ChatRequest(RunFields):
    messages: list[ChatMessage] = Field(max_length=4096)
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)

    def generation_request(self) -> GenerationRequest:
        """Raises ApiError for what cannot be served."""
        functions = [each.function for each in self.tools or ()]
        tools = [function(each.name, each.description, each.parameters) for each in functions]
        messages = [message.for_template(at) for at, message in enumerate(self.messages)]
        return self._request(Conversation(messages, tools, self._variables()))

    @property
    def asks_nothing(self) -> bool:
        """Ollama loads a model so."""
        return not self.messages


class GenerateRequest(RunFields):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    images: list[Any] | None = None
    template: str | None = None
    context: list[int] | None = None

    def generation_request(self) -> GenerationRequest:
        """Raises ApiError for what cannot be served."""
        for name in ("suffix", "images", "template", "context"):
            if getattr(self, name):
                raise bad_request(f"{name} is not supported", name)
        if self.raw:
            return self._request(self.prompt)
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*opening, {"role": "user", "content": self.prompt}]
        return self._request(Conversation(messages, variables=self._variables()))

    @property
    def asks_nothing(self) -> bool:
        """Ollama loads a model so."""
        return not self.prompt
