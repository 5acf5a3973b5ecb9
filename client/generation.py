"""Generation over one session: prompt in, tokens out, and where to stop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..protocol import petal_pb2 as pb
from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.wire.sampling import SamplingParams
from .drafting.registry import DrafterChoice
from .drafting.rounds import Speculation, Verified
from .session.failover import Failover
from .session.session import Session, StepResult, Want

if TYPE_CHECKING:
    from .session.local_ends import LogitsProcessor


@dataclass(frozen=True)
class GenerationConfig:
    """What to generate, in transformers' words. Sampling is off unless `do_sample` or a temperature asks for it."""

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int = 0
    trace: bool = False
    drafter: DrafterChoice = "auto"
    budget: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def want(self) -> Want:
        return Want(top_logprobs=self.top_logprobs, trace=self.trace)


@dataclass
class Piece:
    """What one trip through the route brought: `nodes` were drafted in `draft_s` of its `seconds`."""

    ids: list[int]
    text: str = ""
    logprobs: list[pb.RowLogprobs] = field(default_factory=list)
    hops: list[pb.Hop] = field(default_factory=list)
    seconds: float = 0.0
    nodes: int = 0
    draft_s: float = 0.0
    finish_reason: str | None = None
    events: list[Failover] = field(default_factory=list)


def config_of(
    *,
    max_new_tokens: int = 256,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    top_logprobs: int = 0,
    trace: bool = False,
    drafter: DrafterChoice = "auto",
    budget: int | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    default_eos: frozenset[int] = frozenset(),
) -> GenerationConfig:
    """A config from transformers' argument names; `eos_token_id=-1` ignores the end of text.

    `logits_processor` works where the client holds the head: each gets ids [1, n] and scores [1, vocab] as tensors.

    Raises SamplingError for a value out of range, ValueError for settings that contradict each other.
    """
    if max_new_tokens < 1:
        raise ValueError("max_new_tokens is at least 1")
    shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if do_sample is False and temperature:
        raise ValueError("do_sample=False contradicts a temperature")
    sample = do_sample if do_sample is not None else bool(temperature)
    # As transformers does, shaping without sampling has no effect.
    shaped = {name: value for name, value in shaping.items() if sample and value is not None}
    if sample and "temperature" not in shaped:
        shaped["temperature"] = 1.0
    sampling = SamplingParams(
        **shaped,  # type: ignore[arg-type]
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    eos = (
        default_eos
        if eos_token_id is None
        else frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    )
    stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    if not all(stops):
        raise ValueError("a stop string has at least one character: an empty one would stop every answer at once")
    processors = tuple(logits_processor or ())
    return GenerationConfig(
        max_new_tokens, sampling, eos - {-1}, stops, top_logprobs, trace, drafter, budget, processors
    )


def for_sequence(config: GenerationConfig, index: int) -> GenerationConfig:
    """The same config for another sequence of the same seed."""
    return replace(config, sampling=replace(config.sampling, sequence=index))


async def generate(
    session: Session,
    prompt: Sequence[int],
    config: GenerationConfig,
    tokenizer: Tokenizer | None = None,
    speculation: Speculation | None = None,
) -> AsyncIterator[Piece]:
    """Pieces of the answer to `prompt`, which may continue or branch off what the session holds.

    Leaves the session so that `session.ids` are exactly prompt and answer, but for tokens that are not cached yet.
    Raises ValueError for an empty or too long prompt, PeerError where the route fails.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    positions = min(session.context_length, session.options.reserve_tokens)
    room = positions - len(prompt)
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in {positions} positions")
    if config.logits_processors and not session.options.head:
        raise ValueError("a logits_processor needs the scores on this machine: connect with local_head=True")
    session.logits_processors = config.logits_processors
    speculation = speculation or Speculation()
    stopper = _Stopper(config, tokenizer, min(config.max_new_tokens, room + 1))
    kept = common_prefix(session.ids, prompt[:-1])
    session.rewind(kept)
    started = time.perf_counter()
    done = Verified(await session.prefill(prompt[kept:], config.sampling, config.want()))
    speculation.start(prompt, config.sampling)
    ids = list(prompt)
    while True:
        result = done.result
        assert result.next_token is not None
        piece = stopper.take([*result.path_ids, result.next_token], result)
        ids.extend(piece.ids)
        piece.seconds, piece.nodes, piece.draft_s = time.perf_counter() - started, done.nodes, done.draft_s
        piece.events = session.take_events()
        if len(session.ids) > len(ids):
            session.rewind(len(ids))
        yield piece
        if piece.finish_reason:
            return
        started = time.perf_counter()
        room = positions - len(ids) if stopper.left > 1 else 0
        done = await speculation.round(session, ids, room, config.want())


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of what both begin with."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


class _Stopper:
    """Cuts the stream of tokens at the end of text, at a stop string, or at the token limit."""

    def __init__(self, config: GenerationConfig, tokenizer: Tokenizer | None, limit: int) -> None:
        if config.stop_strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._stops = config.stop_strings
        # Special tokens are no part of the text: where a stop string is one, its id is looked for.
        self._ends = config.eos_token_ids | (tokenizer.special_ids_of(self._stops) if tokenizer else frozenset())
        self._held = ""
        self.left = limit

    def take(self, ids: list[int], result: StepResult) -> Piece:
        piece = Piece([], logprobs=result.logprobs, hops=result.hops)
        for token in ids:
            piece.ids.append(token)
            self.left -= 1
            if token in self._ends:
                piece.finish_reason = "stop"
            else:
                self._held += self._detokenizer.add(token) if self._detokenizer else ""
                if self._cut_at_stop(piece):
                    piece.finish_reason = "stop_string"
                elif not self.left:
                    piece.finish_reason = "length"
            if piece.finish_reason:
                break
        piece.logprobs = piece.logprobs[: len(piece.ids)]
        if piece.finish_reason != "stop_string":
            self._release(piece)
        return piece

    def _cut_at_stop(self, piece: Piece) -> bool:
        if not self._stops:
            return False
        # An answer that ends here says what is pending, too.
        said = self._held + (self._detokenizer.pending if self._detokenizer else "")
        found = [at for stop in self._stops if (at := said.find(stop)) >= 0]
        if found:
            piece.text += said[: min(found)]
        return bool(found)

    def _release(self, piece: Piece) -> None:
        """Give out text, but hold back what may turn out to be the start of a stop string."""
        if piece.finish_reason and self._detokenizer:
            self._held += self._detokenizer.flush()
        keep = 0 if piece.finish_reason else self._possible_stop()
        cut = len(self._held) - keep
        piece.text += self._held[:cut]
        self._held = self._held[cut:]

    def _possible_stop(self) -> int:
        longest = 0
        for stop in self._stops:
            for size in range(1, min(len(stop), len(self._held) + 1)):
                if self._held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest
