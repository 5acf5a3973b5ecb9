"""Fields that both of OpenAI's completion APIs have, and what they mean to `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ...config import GenerationSettings
from ..body import Body, Number
from ..errors import bad_request

# Neither larger answers nor more of them fit anywhere.
MOST_TOKENS = 1 << 20
MOST_CHOICES = 32
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 512

Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


def token_biases(given: Mapping[str, float]) -> dict[int, float]:
    """Raises ApiError where a key is no token id."""
    if wrong := next((key for key in given if not key.isdecimal() or len(key) > 9), None):
        raise bad_request(f"logit_bias has token ids as keys, not {wrong[:40]!r}", "logit_bias")
    return {int(key): bias for key, bias in given.items()}


class StreamOptions(Body):
    """`include_usage`: a last chunk tells the tokens used."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingFields(Body):
    """top_k, min_p, repetition_penalty are those of `generate`, which OpenAI's own API does not have."""

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=-1, lt=1 << 32)
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Number] | None = None
    user: str | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse(self, **neutral: Any) -> None:
        """Raises ApiError for a field that asks for something else than its `neutral` value."""
        for name, value in neutral.items():
            if getattr(self, name) not in (None, value):
                raise bad_request(f"{name}={getattr(self, name)!r:.60} is not supported", name, "unsupported_parameter")

    def settings(self, top_logprobs: int) -> GenerationSettings:
        """What the fields say, by the names of `generate`; without a seed every answer differs."""
        if self.stream_options and not self.stream:
            raise bad_request("stream_options are for streams only", "stream_options")
        settings: GenerationSettings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "seed": None if self.seed is None else self.seed % (1 << 64),
            "stop_strings": self.stop,
            "logit_bias": token_biases(self.logit_bias or {}),
            "top_logprobs": top_logprobs,
        }
        return settings
