"""POST /v1/completions: what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from ..errors import bad_request
from ..generation_request import GenerationRequest
from .sampling_fields import MOST_CHOICES, Count, SamplingFields

MOST_PROMPTS = 64
MOST_LOGPROBS = 20
# Where a request does not say, as in OpenAI's API.
DEFAULT_TOKENS = 16

Ids = Annotated[list[int], Field(max_length=1 << 20)]
Texts = Annotated[list[str], Field(max_length=MOST_PROMPTS)]
Prompt = str | Ids | Texts | Annotated[list[Ids], Field(max_length=MOST_PROMPTS)]


class CompletionRequest(SamplingFields):
    """One text or many, or token ids."""

    prompt: Prompt
    max_tokens: Count | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    # Served with one value only.
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given

    def generation_request(self) -> GenerationRequest:
        """Raises ApiError for what contradicts itself or cannot be served."""
        self.refuse(best_of=self.n or 1, suffix="")
        if not self.prompts:
            raise bad_request("there is no prompt", "prompt")
        if len(self.prompts) * (self.n or 1) > 2 * MOST_CHOICES:
            raise bad_request(f"one request has at most {2 * MOST_CHOICES} answers", "n")
        if self.echo and self.logprobs is not None:
            raise bad_request("echo=true with logprobs is not supported", "echo", "unsupported_parameter")
        return GenerationRequest(
            model=self.model,
            prompts=self.prompts,
            settings=self.settings(0 if self.logprobs is None else max(1, self.logprobs)),
            max_tokens=self.max_tokens or DEFAULT_TOKENS,
            n=self.n or 1,
            logprobs=self.logprobs is not None,
        )
