"""Settings of a generation: the one place where they are named and checked."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from ..protocol.checkpoint.generation_defaults import GenerationDefaults
from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.wire.sampling import SamplingParams
from .drafting.registry import DrafterChoice
from .session.result import OutputOptions

if TYPE_CHECKING:
    from .session.local_ends import LogitsProcessor


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of whatever generates; GenerationConfig says what they mean."""

    max_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    eos_token_id: int | Collection[int] | None
    stop_strings: str | Sequence[str] | None
    top_logprobs: int
    trace: bool
    drafter: DrafterChoice
    budget: int | None
    logits_processor: Sequence[LogitsProcessor] | None


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What to generate, in transformers' words.

    Sampling is off unless `do_sample`, a temperature, or the model's generation_config.json asks for it; without it, as
    in transformers, `top_k`, `top_p` and `min_p` have no effect. The same `seed` gives the same text, and by default it
    is 0; None takes a fresh one. `sequence` tells apart the answers of one seed.
    `eos_token_id`: ids that end the text, by default the model's own; -1 for none. `stop_strings` end it, too.
    `top_logprobs`: so many of the likeliest tokens come with each token. `trace`: times of each hop come along.
    `drafter` guesses ahead: "auto", "ngram", "model", "none", a checkpoint, several with commas, or Drafter objects;
    `budget` is the number of tokens that it guesses a round, by default what pays most. Neither changes the text.
    `logits_processor` works with local ends: each gets ids [1, n] and scores [1, vocab] as tensors, and returns scores.

    Raises SamplingError for a value out of range, ValueError for settings that contradict each other.
    """

    max_new_tokens: int = 256
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = 0
    sequence: int = 0
    eos_token_id: int | Collection[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    top_logprobs: int = 0
    trace: bool = False
    drafter: DrafterChoice = "auto"
    budget: int | None = None
    logits_processor: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens is at least 1")
        if self.do_sample is False and self.temperature:
            raise ValueError("do_sample=False contradicts a temperature")
        if not all(self.stops):
            raise ValueError("a stop string has at least one character: an empty one would stop every answer at once")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(64))
        _ = self.sampling  # checks the values

    @cached_property
    def sampling(self) -> SamplingParams:
        """How the last stage draws."""
        sample = self.do_sample if self.do_sample is not None else bool(self.temperature)
        shaping = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        shaped = {name: value for name, value in shaping.items() if sample and value is not None}
        if sample and "temperature" not in shaped:
            shaped["temperature"] = 1.0
        return SamplingParams(
            **shaped,  # type: ignore[arg-type]
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed or 0,
            sequence=self.sequence,
        )

    @cached_property
    def output(self) -> OutputOptions:
        """What comes back beside tokens."""
        return OutputOptions(top_logprobs=self.top_logprobs, trace=self.trace)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also where there is one or none."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings or ())

    def eos_ids(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """Ids that end the text of a model with this tokenizer."""
        if self.eos_token_id is None:
            return frozenset(tokenizer.eos_ids) if tokenizer else frozenset()
        # A tensor's elements are tensors, which equal no id in a set.
        listed: Any = self.eos_token_id.tolist() if hasattr(self.eos_token_id, "tolist") else self.eos_token_id
        return frozenset([listed] if isinstance(listed, int) else map(int, listed)) - {-1}


def with_defaults(settings: GenerationSettings, defaults: GenerationDefaults) -> GenerationConfig:
    """`settings`, and the model's own for what they leave open. Raises as GenerationConfig does."""
    filled: dict[str, Any] = {**settings}
    if filled.get("eos_token_id") is None and defaults.eos_ids:
        filled["eos_token_id"] = defaults.eos_ids
    if filled.get("do_sample") is None:
        temperature = filled.get("temperature")
        filled["do_sample"] = defaults.do_sample if temperature is None else temperature > 0
    for name, value in defaults.sampling.items():
        # As in transformers, a penalty acts on greedy text, too.
        if filled.get(name) is None and (filled["do_sample"] or name == "repetition_penalty"):
            filled[name] = value
    return GenerationConfig(**filled)
