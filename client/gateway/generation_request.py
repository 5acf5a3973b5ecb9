"""What a request asks of a model, whichever API it came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import GenerationSettings

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages and functions in OpenAI's words, which chat templates take; `variables` reach the template as they are.

    `one_call`: at most one function is called.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    # Whether the last message, the assistant's, is to be gone on with.
    goes_on: bool = False
    one_call: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """`n` answers to each prompt: a conversation, text as it is, or token ids.

    `max_tokens`: of one answer; None leaves it to the gateway. `logprobs`: whether tokens come with theirs;
    `settings` says of how many others.
    """

    model: str
    prompts: Sequence[Conversation | str | Sequence[int]]
    settings: GenerationSettings
    max_tokens: int | None = None
    n: int = 1
    logprobs: bool = False
