"""POST /v1/chat/completions: what is asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...config import GenerationSettings
from ..body import TolerantBody
from ..errors import bad_request
from ..formats import schema_settings
from ..functions import MOST_TOOLS, function
from ..generation_request import Conversation, GenerationRequest
from .messages import Messages, template_messages
from .sampling_fields import Count, SamplingFields

MOST_TOP_LOGPROBS = 20


class Function(TolerantBody):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(TolerantBody):
    type: Literal["function"]
    function: Function


class JsonSchema(TolerantBody):
    """`strict` says nothing: the text always follows the schema."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class ResponseFormat(TolerantBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def settings(self) -> GenerationSettings:
        """Raises ApiError."""
        return schema_settings(self.type, self.json_schema.schema_ if self.json_schema else None, "response_format")


class ChatRequest(SamplingFields):
    """Fields without a reader say nothing of the text, or are refused unless they ask for what is done anyway."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, max_length=32)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Without effect on what is said.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Served with one value only.
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None

    def generation_request(self) -> GenerationRequest:
        """Raises ApiError for what contradicts itself or cannot be served."""
        self.refuse(
            modalities=["text"], audio=None, prediction=None, verbosity="medium", web_search_options=None,
            functions=None, function_call=None,
        )  # fmt: skip
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.tool_choice not in (None, "auto", "none"):
            raise bad_request("tool_choice can be auto or none", "tool_choice", "unsupported_parameter")
        functions = [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]
        goes_on = bool(self.continue_final_message) or self.add_generation_prompt is False
        return GenerationRequest(
            model=self.model,
            prompts=[
                Conversation(
                    template_messages(self.messages),
                    [function(f.name, f.description, f.parameters) for f in functions],
                    variables,
                    goes_on,
                    one_call=self.parallel_tool_calls is False,
                )
            ],
            settings={
                **self.settings(max(1, self.top_logprobs or 0) if self.logprobs else 0),
                **(self.response_format.settings() if self.response_format else {}),
            },
            max_tokens=self.max_completion_tokens or self.max_tokens,
            n=self.n or 1,
            logprobs=bool(self.logprobs),
        )
