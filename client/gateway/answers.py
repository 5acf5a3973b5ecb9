"""From a request to the events of its answers: prompts become ids, sessions are found, choices run side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from ...protocol import petal_pb2 as pb
from ...protocol.checkpoint.tokenizer import Tokenizer
from ..config import GenerationConfig
from ..generation import Generator, common_prefix
from ..output import OutputChunk
from ..routing.route import NoRoute
from ..session.peer_error import PeerError
from ..session.session import Session
from .errors import bad_request
from .events import Begin, Event, Finish, FinishReason, ScoredToken, Text
from .generation_request import Conversation, GenerationRequest
from .merge import merged
from .served_model import ServedModel

# Tokens of an answer where the request does not say.
DEFAULT_TOKENS = 1024
# How long a request waits for peers that are busy, and for blocks that nobody hosts.
BUSY_S = 20.0
_FINISH: dict[str, FinishReason] = {"length": "length", "time": "length"}


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a request, ready to run."""

    ids: Sequence[int]
    config: GenerationConfig

    @property
    def reserve_tokens(self) -> int:
        return len(self.ids) + self.config.max_new_tokens


async def answer(served: ServedModel, request: GenerationRequest, owner: str) -> AsyncGenerator[Event, None]:
    """The events of all choices: n to the first prompt, n to the next. Raises PetalError."""
    prompts = [_prepare(served, request, prompt) for prompt in request.prompts]
    runs = [_answers(served, prompt, request, owner, at * request.n) for at, prompt in enumerate(prompts)]
    async with aclosing(merged(runs)) as events:
        async for event in events:
            yield event


def encode(generator: Generator, prompt: Conversation | str | Sequence[int]) -> list[int]:
    """A prompt's token ids. Raises SettingsError, ChatTemplateError."""
    if not isinstance(prompt, Conversation):
        return generator.encode(prompt)
    if generator.tokenizer is None:
        raise bad_request(f"messages need a tokenizer, give token ids: {generator.lack}")
    variables = dict(prompt.variables)
    if prompt.tools:
        variables["tools"] = list(prompt.tools)
    return generator.tokenizer.apply_chat_template(prompt.messages, not prompt.goes_on, **variables)


def _prepare(served: ServedModel, request: GenerationRequest, prompt: Conversation | str | Sequence[int]) -> _Prompt:
    """Raises ApiError, SettingsError, SamplingError, ChatTemplateError for what cannot be run."""
    generator, context = served.generator, served.context_length
    ids = encode(generator, prompt)
    if not ids:
        raise bad_request("the prompt is empty", "prompt")
    if tokenizer := generator.tokenizer:
        worst = max(ids)
        if min(ids) < 0 or worst >= max(tokenizer.vocab_size, tokenizer.trained_size):
            raise bad_request(f"token id {worst} is past the vocabulary of {tokenizer.vocab_size}", "prompt")
    if context and len(ids) >= context:
        raise bad_request(
            f"{served.name} has a context of {context} tokens, the prompt has {len(ids)}: "
            f"it is {len(ids) - context + 1} too long for an answer of one token",
            "messages" if isinstance(prompt, Conversation) else "prompt",
            "context_length_exceeded",
        )
    room = context - len(ids) if context else DEFAULT_TOKENS
    tokens = min(request.max_tokens or DEFAULT_TOKENS, room)
    config = generator.config({**request.settings, "max_new_tokens": tokens})
    return _Prompt(ids, config)


async def _answers(
    served: ServedModel, prompt: _Prompt, request: GenerationRequest, owner: str, first_choice: int
) -> AsyncGenerator[Event, None]:
    """All choices of one prompt, over as many sessions as there is room for."""
    async with _sessions(served, prompt, request.n, owner) as (free, cached):
        yield Begin(len(prompt.ids), cached)
        choices = [
            _choice(served.generator, prompt, replace(prompt.config, sequence=i), free, first_choice + i, request)
            for i in range(request.n)
        ]
        async with aclosing(merged(choices)) as events:
            async for event in events:
                yield event


@asynccontextmanager
async def _sessions(
    served: ServedModel, prompt: _Prompt, n: int, owner: str
) -> AsyncIterator[tuple[asyncio.Queue[Session], int]]:
    """Sessions for n choices, at least one, which share what the prompt has them compute; and how much one had of it.

    One of them is kept for what may come next, if all went well.
    """
    pool = served.sessions
    try:
        first = await pool.take(owner, prompt.ids, prompt.reserve_tokens, BUSY_S)
    except NoRoute as error:
        raise served.why_not(str(error)) from error
    held = [first]
    complete = False
    try:
        cached = common_prefix(first.ids, prompt.ids[:-1])
        if n > 1:
            first.rewind(cached)
            if rest := prompt.ids[cached:-1]:
                await first.prefill(rest)
            with contextlib.suppress(PeerError):  # then choices take turns
                for _ in range(n - 1):
                    held.append(await first.fork())
        free: asyncio.Queue[Session] = asyncio.Queue()
        for session in held:
            free.put_nowait(session)
        yield free, cached
        complete = True
    finally:
        # Interrupted with a step in flight, what the peers hold is not known for sure.
        for session in held[1 if complete else 0 :]:
            session.close()
        if complete:
            pool.give_back(owner, first)


async def _choice(
    generator: Generator,
    prompt: _Prompt,
    config: GenerationConfig,
    free: asyncio.Queue[Session],
    choice: int,
    request: GenerationRequest,
) -> AsyncGenerator[Event, None]:
    """One answer, as soon as a session is free."""
    session = await free.get()
    async with aclosing(await generator.chunks(session, prompt.ids, config)) as chunks:
        async for chunk in chunks:
            tokens = _scored(chunk, generator.tokenizer) if request.logprobs else ()
            yield Text(choice, chunk.text, len(chunk.ids), tokens)
            if chunk.finish_reason:
                yield Finish(choice, _FINISH.get(chunk.finish_reason, "stop"), chunk.stop_string)
    free.put_nowait(session)


def _scored(chunk: OutputChunk, tokenizer: Tokenizer | None) -> tuple[ScoredToken, ...]:
    def token(id: int, logprob: float, top: Sequence[pb.Logprob] = ()) -> ScoredToken:
        text = tokenizer.decode([id], skip_special=False) if tokenizer else ""
        return ScoredToken(id, text, logprob, tuple(token(other.id, other.logprob) for other in top))

    return tuple(token(id, row.chosen, row.top) for id, row in zip(chunk.ids, chunk.logprobs, strict=False))
