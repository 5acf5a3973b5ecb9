"""From a request to the events of its answers: prompts become ids, sessions are found, choices run side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from ...protocol import petal_pb2 as pb
from ...protocol.checkpoint.tokenizer import Tokenizer
from ..config import GenerationConfig, GenerationSettings
from ..generation import Generator, common_prefix
from ..output import OutputChunk
from ..routing.route import NoRoute
from ..session.peer_error import PeerError
from ..session.session import Session
from .errors import bad_request
from .events import Begin, Event, ScoredToken, Tokens
from .generation_request import Conversation, GenerationRequest
from .merge import merged
from .prompt import Prompt, read_prompt
from .reading import Reading
from .served_model import ServedModel

# Tokens of an answer where the request does not say.
DEFAULT_TOKENS = 1024
# How long a request waits for peers that are busy, and for blocks that nobody hosts.
BUSY_S = 20.0


@dataclass(frozen=True)
class _Run:
    """One prompt of a request, ready to run."""

    prompt: Prompt
    config: GenerationConfig

    @property
    def ids(self) -> Sequence[int]:
        return self.prompt.ids


async def answer(served: ServedModel, request: GenerationRequest, owner: str) -> AsyncGenerator[Event, None]:
    """The events of all choices: n to the first prompt, n to the next. Raises PetalError."""
    prepared = [_prepare(served, request, prompt) for prompt in request.prompts]
    runs = [_answers(served, run, request, owner, at * request.n) for at, run in enumerate(prepared)]
    async with aclosing(merged(runs)) as events:
        async for event in events:
            yield event


def _prepare(served: ServedModel, request: GenerationRequest, asked: Conversation | str | Sequence[int]) -> _Run:
    """Raises ApiError, SettingsError, SamplingError, ChatTemplateError for what cannot be run."""
    generator = served.generator
    prompt = read_prompt(generator, asked)
    check_length(served, prompt.ids)
    context = served.context_length
    room = context - len(prompt.ids) if context else DEFAULT_TOKENS
    tokens = min(request.max_tokens or DEFAULT_TOKENS, room)
    own: GenerationSettings = {"max_new_tokens": tokens, "visible_tokens": prompt.visible, "drafter": served.drafter}
    return _Run(prompt, generator.config({**request.settings, **own}))


def check_length(served: ServedModel, ids: Sequence[int]) -> None:
    """Whether a prompt leaves room for an answer, and is of tokens that there are. Raises ApiError."""
    context = served.context_length
    if not ids:
        raise bad_request("the prompt is empty", "prompt")
    if tokenizer := served.generator.tokenizer:
        size = max(tokenizer.vocab_size, tokenizer.trained_size)
        if (wrong := next((id for id in ids if not 0 <= id < size), None)) is not None:
            raise bad_request(f"token id {wrong} is outside the vocabulary of {tokenizer.vocab_size}", "prompt")
    if context and len(ids) >= context:
        raise bad_request(
            f"{served.name} has a context of {context} tokens, the prompt has {len(ids)}: "
            f"it is {len(ids) - context + 1} too long for an answer of one token",
            "prompt",
            "context_length_exceeded",
        )


async def _answers(
    served: ServedModel, run: _Run, request: GenerationRequest, owner: str, first_choice: int
) -> AsyncGenerator[Event, None]:
    """All choices of one prompt, over as many sessions as there is room for."""
    async with _sessions(served, run, request.n, owner) as (free, cached):
        yield Begin(len(run.ids), cached)
        choices = [
            _choice(served.generator, run, replace(run.config, sequence=i), free, first_choice + i, request)
            for i in range(request.n)
        ]
        async with aclosing(merged(choices)) as events:
            async for event in events:
                yield event


@asynccontextmanager
async def _sessions(
    served: ServedModel, run: _Run, n: int, owner: str
) -> AsyncIterator[tuple[asyncio.Queue[Session], int]]:
    """Sessions for n choices, at least one, which share what the prompt has them compute; and how much one had of it.

    One of them is kept for what may come next, if all went well.
    """
    pool = served.sessions
    try:
        first = await pool.take(owner, run.ids, run.config, BUSY_S)
    except NoRoute as error:
        raise served.why_not(str(error)) from error
    held = [first]
    complete = False
    try:
        cached = common_prefix(first.ids, run.ids[:-1])
        if n > 1:
            first.rewind(cached)
            if rest := run.ids[cached:-1]:
                await first.prefill(rest)
            with contextlib.suppress(PeerError):  # then choices take turns
                for _ in range(n - 1):
                    held.append(await pool.fork(first))
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
    run: _Run,
    config: GenerationConfig,
    free: asyncio.Queue[Session],
    choice: int,
    request: GenerationRequest,
) -> AsyncGenerator[Event, None]:
    """One answer, as soon as a session is free."""
    session = await free.get()
    reading = Reading(choice, run.prompt.parser(), run.prompt.one_call)
    async with aclosing(await generator.chunks(session, run.ids, config)) as chunks:
        async for chunk in chunks:
            scored = _scored(chunk, generator.tokenizer) if request.logprobs else ()
            yield Tokens(choice, len(chunk.ids), scored)
            for event in reading.take(chunk):
                yield event
            if reading.finished:
                break
    free.put_nowait(session)


def _scored(chunk: OutputChunk, tokenizer: Tokenizer | None) -> tuple[ScoredToken, ...]:
    def token(id: int, logprob: float, top: Sequence[pb.Logprob] = ()) -> ScoredToken:
        text = tokenizer.decode([id], skip_special=False) if tokenizer else ""
        return ScoredToken(id, text, logprob, tuple(token(other.id, other.logprob) for other in top))

    return tuple(token(id, row.chosen, row.top) for id, row in zip(chunk.ids, chunk.logprobs, strict=False))
