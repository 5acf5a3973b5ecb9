"""POST /v1/chat/completions: what is asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..errors import bad_request
from ..generation_request import Conversation, GenerationRequest
from .messages import Messages, template_messages
from .sampling_fields import Count, SamplingFields

MOST_TOP_LOGPROBS = 20


class ChatRequest(SamplingFields):
    """Fields without a reader say nothing of the text, or are refused unless they ask for what is done anyway."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
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
        goes_on = bool(self.continue_final_message) or self.add_generation_prompt is False
        return GenerationRequest(
            model=self.model,
            prompts=[Conversation(template_messages(self.messages), variables=variables, goes_on=goes_on)],
            settings=self.settings(max(1, self.top_logprobs or 0) if self.logprobs else 0),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            n=self.n or 1,
            logprobs=bool(self.logprobs),
        )
