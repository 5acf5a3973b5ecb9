"""Settings of a generation: the one place where they are named and checked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from ..protocol.checkpoint.generation_defaults import GenerationDefaults
from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.wire.sampling import SamplingParams
from .arguments import SettingsError, honoured
from .drafting.registry import DrafterChoice
from .grammar import GRAMMAR_KINDS, biases, grammar_of
from .session.result import OutputOptions
from .tensors import LogitsProcessor, StoppingCriterion, tensor

if TYPE_CHECKING:
    from .beams import EarlyStopping


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of whatever generates; GenerationConfig says what they mean.

    Of transformers' other arguments those are taken that ask for nothing else, such as `num_beams=1` or `use_cache`.
    """

    generation_config: Any
    max_new_tokens: int | None
    max_length: int | None
    max_time: float | None
    prompt_lookup_num_tokens: int | None
    stopping_criteria: Sequence[StoppingCriterion] | None
    pad_token_id: int | None
    min_new_tokens: int | None
    min_length: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    sequence_bias: Any
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    renormalize_logits: bool
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: EarlyStopping
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    use_cache: bool
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    json_schema: Mapping[str, Any] | bool | str | None
    regex: str | None
    grammar: str | None
    seed: int | None
    eos_token_id: int | Collection[int] | None
    stop_strings: str | Sequence[str] | None
    visible_tokens: Collection[int]
    top_logprobs: int
    trace: bool
    drafter: DrafterChoice
    budget: int | None
    logits_processor: Sequence[LogitsProcessor] | None


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationConfig:
    """What to generate, in transformers' words.

    `max_length` counts the prompt, too, and holds in place of `max_new_tokens`. `max_time` ends an answer after so many
    seconds; `stopping_criteria` are asked behind each token. `pad_token_id` fills the rows of a result.
    Sampling is off unless `do_sample`, a temperature, or the model's generation_config.json asks for it; without it, as
    in transformers, `top_k`, `top_p` and `min_p` have no effect. The same `seed` gives the same text, and by default it
    is 0; None takes a fresh one. `sequence` tells apart the answers of one seed.
    `eos_token_id`: ids that end the text, by default the model's own; -1 for none. `stop_strings` end it, too.
    `visible_tokens`: special tokens, by id, that are part of the text.
    `logit_bias` is added to the scores of token ids, behind the penalties. Of `json_schema`, `regex` (Rust's syntax,
    matched as a whole) and `grammar` (in Lark's notation) one may say what the text must follow.
    `top_logprobs`: so many of the likeliest tokens come with each token. `trace`: times of each hop come along.
    `drafter` guesses ahead: "auto", "ngram", "model", "none", a checkpoint, several with commas, or Drafter objects;
    `budget` is the number of tokens that it guesses a round, by default what pays most. Neither changes the text.
    For `generate` alone: `num_return_sequences` answers to each prompt; with `num_beams` above 1 they are the best that
    a beam search finds, see BeamRules for `length_penalty` and `early_stopping`, and nothing is drawn. With
    `return_dict_in_generate` the result is a GenerateOutput, with scores and logits where `output_scores` and
    `output_logits` ask for them: those of the whole vocabulary come here for each token, and nothing is drafted.
    With beams or local ends alone: `min_new_tokens`, `min_length`, `no_repeat_ngram_size`, `bad_words_ids`,
    `suppress_tokens`, `begin_suppress_tokens`, `sequence_bias`, `forced_bos_token_id`, `forced_eos_token_id`,
    `exponential_decay_length_penalty`, and each `logits_processor`: it gets ids [1, n] and scores [1, vocab], as
    tensors where torch is installed, and returns scores.

    Raises SamplingError for a value out of range, SettingsError for settings that contradict each other.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    max_time: float | None = None
    stopping_criteria: Sequence[StoppingCriterion] | None = None
    pad_token_id: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Any = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    seed: int | None = 0
    sequence: int = 0
    eos_token_id: int | Collection[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    visible_tokens: Collection[int] = ()
    top_logprobs: int = 0
    trace: bool = False
    drafter: DrafterChoice = "auto"
    budget: int | None = None
    logits_processor: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingsError("max_new_tokens is at least 1")
        if self.do_sample is False and self.temperature:
            raise SettingsError("do_sample=False contradicts a temperature")
        if self.max_time is not None and not self.max_time > 0:
            raise SettingsError("max_time is a number of seconds above 0")
        if not all(self.stops):
            raise SettingsError("a stop string has at least one character: an empty one would stop all answers at once")
        self._check_beams()
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(64))
        _ = self.sampling, self.grammar_text  # checks the values

    def _check_beams(self) -> None:
        for name in ("num_beams", "num_return_sequences"):
            if isinstance(count := getattr(self, name), bool) or not isinstance(count, int) or count < 1:
                raise SettingsError(f"{name} is a number of at least 1, not {count!r:.60}")
        if self.early_stopping not in (True, False, "never"):
            raise SettingsError(f'early_stopping is True, False or "never", not {self.early_stopping!r:.60}')
        if self.num_beams == 1:
            return
        if self.num_return_sequences > self.num_beams:
            raise SettingsError(f"{self.num_beams} beams give no {self.num_return_sequences} num_return_sequences")
        if self.sampling.temperature:
            raise SettingsError("num_beams takes the likeliest tokens and draws none: give do_sample=False")

    def alone(self) -> GenerationConfig:
        """The same, for one answer that comes token by token. Raises SettingsError where more is asked for."""
        for name in ("num_beams", "num_return_sequences", "return_dict_in_generate"):
            if (value := getattr(self, name)) not in (1, False):
                raise SettingsError(f"{name}={value} is for generate, which gives whole answers")
        return self

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.said().items())})"

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
            logit_bias=biases(self.logit_bias or {}),
        )

    @cached_property
    def grammar_text(self) -> str:
        """What the text must follow, as llguidance writes it; empty where it is free. Raises SettingsError."""
        given = {name: value for name in GRAMMAR_KINDS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} contradict each other: give one of them")
        return grammar_of(*given.popitem()) if given else ""

    @cached_property
    def output(self) -> OutputOptions:
        """What comes back beside tokens."""
        logits = self.return_dict_in_generate and (self.output_scores or self.output_logits)
        return OutputOptions(top_logprobs=self.top_logprobs, trace=self.trace, logits=logits)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also where there is one or none."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings or ())

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens the answer to such a prompt may have. Raises SettingsError where there is room for none."""
        if self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= prompt_length:
            raise SettingsError(f"a prompt of {prompt_length} tokens leaves no room in max_length={self.max_length}")
        return self.max_length - prompt_length

    def ending(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str | None]:
        """Why an answer, given its ids so far, ends by its time or by a criterion; from now on."""
        deadline = None if self.max_time is None else time.monotonic() + self.max_time

        def reason(answer: Sequence[int]) -> str | None:
            if deadline is not None and time.monotonic() >= deadline:
                return "time"
            if not self.stopping_criteria:
                return None
            ids = tensor([[*prompt, *answer]])
            return "criterion" if any(bool(stop(ids, None)) for stop in self.stopping_criteria) else None

        return reason

    def said(self) -> dict[str, Any]:
        """What differs from the defaults."""
        given = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, default) in given.items() if value is not default}

    def eos_ids(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """Ids that end the text of a model with this tokenizer."""
        if self.eos_token_id is None:
            return frozenset(tokenizer.eos_ids) if tokenizer else frozenset()
        # A tensor's elements are tensors, which equal no id in a set.
        listed: Any = self.eos_token_id.tolist() if hasattr(self.eos_token_id, "tolist") else self.eos_token_id
        return frozenset([listed] if isinstance(listed, int) else map(int, listed)) - {-1}


def with_defaults(settings: GenerationSettings, defaults: GenerationDefaults) -> GenerationConfig:
    """`settings`, and the model's own for what they leave open. Raises SamplingError, SettingsError."""
    filled = honoured(settings, [each.name for each in fields(GenerationConfig)])
    if filled.get("eos_token_id") is None and defaults.eos_ids:
        filled["eos_token_id"] = defaults.eos_ids
    if filled.get("do_sample") is None:
        temperature = filled.get("temperature")
        filled["do_sample"] = defaults.do_sample if temperature is None else temperature > 0
    if filled.get("pad_token_id") is None:
        filled["pad_token_id"] = defaults.pad_id
    for name, value in defaults.sampling.items():
        # As in transformers, a penalty acts on greedy text, too.
        if filled.get(name) is None and (filled["do_sample"] or name == "repetition_penalty"):
            filled[name] = value
    return GenerationConfig(**filled)
