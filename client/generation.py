"""Generation over one session: prompt in, tokens out, and where to stop."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from operator import index
from typing import Any, cast

from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.grammar.grammar import GrammarMatcher, masked
from .arguments import SettingsError
from .config import GenerationConfig, GenerationSettings, with_defaults
from .connection import TREE_ROOM, SwarmConnection
from .drafting.grammar import GrammarRegistry
from .drafting.registry import DrafterRegistry
from .drafting.rounds import Speculation, Verified
from .model_text import ModelText
from .output import OutputChunk, OutputCutter
from .routing.grammar_peers import choose_feature
from .score_rules import NEED_SCORES, chained, score_rules
from .session.options import Grammar
from .session.result import StepResult
from .session.session import Session

# Text, messages as in OpenAI's API, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

BYTES = (bytes, bytearray, memoryview)
NO_BYTES = "a prompt is text, messages or token ids, not bytes: decode it first"


class Generator:
    """Answers of one model: sessions of `connection`, drafts for them, text by `tokenizer`."""

    def __init__(self, connection: SwarmConnection, text: ModelText, drafter_device: str = "cpu") -> None:
        self.connection = connection
        self.tokenizer = tokenizer = text.tokenizer
        self._text = text
        self._drafters = DrafterRegistry(tokenizer, connection.known.digest or b"", drafter_device)
        self._grammars = GrammarRegistry(tokenizer) if tokenizer else None

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or of messages; ids as they are. Raises SettingsError, ChatTemplateError."""
        if isinstance(prompt, BYTES):
            raise SettingsError(NO_BYTES)
        try:
            messages = None if isinstance(prompt, str) else messages_in(prompt)
            if messages is None and not isinstance(prompt, str):
                return [index(token) for token in cast("Sequence[int]", prompt)]
        except TypeError:
            raise SettingsError(f"a prompt is text, messages or token ids, not {prompt!r:.60}") from None
        if self.tokenizer is None:
            raise SettingsError(f"a text prompt needs a tokenizer, give token ids: {self.lack}")
        if messages is not None:
            return self.tokenizer.apply_chat_template(messages)
        return self.tokenizer.encode(cast("str", prompt))

    @property
    def lack(self) -> str:
        """Why there is no tokenizer."""
        return self._text.lack

    def config(self, settings: GenerationSettings) -> GenerationConfig:
        """`settings`, with the model's own where they say nothing. Raises SamplingError, SettingsError."""
        return with_defaults(settings, self._text.defaults)

    async def open_session(
        self, config: GenerationConfig, reserve_tokens: int, wait_s: float | None = None, spare_tokens: int = 0
    ) -> Session:
        """For answers by `config`; see SwarmConnection.open_session. Raises PeerError, NoRoute."""
        grammar = self.grammar(config)
        return await self.connection.open_session(reserve_tokens, wait_s, spare_tokens, grammar)

    def grammar(self, config: GenerationConfig) -> Grammar | None:
        """What a session must know of what its text has to follow. Raises NoRoute where no peer serves it."""
        if not config.grammar_text or self.connection.draws:
            return None
        if self.tokenizer is None:
            raise SettingsError(f"a grammar needs a tokenizer: {self.lack}")
        return Grammar(config.grammar_text, choose_feature(self.connection.known.reachable(), self.tokenizer))

    async def speculation(self, config: GenerationConfig, session: Session) -> Speculation:
        """Drafting for one sequence, as `config` asks; what was learned about a route serves all its sessions.

        None where logits come along: those of drafted rows would be sent for nothing.
        """
        if config.output.logits:
            return Speculation()
        return await self._drafters.speculation(config.drafter, config.budget, session.route)

    async def chunks(
        self, session: Session, ids: Sequence[int], config: GenerationConfig
    ) -> AsyncGenerator[OutputChunk, None]:
        """Start an answer over a session; see `generate`."""
        speculation = await self.speculation(config, session)
        grammar = None
        if config.grammar_text and self._grammars:
            grammar = await self._grammars.matcher(config.grammar_text, session.route[-1].peer.vocab_size)
        return generate(session, ids, config, self.tokenizer, speculation, grammar)

    async def stream(self, ids: Sequence[int], config: GenerationConfig) -> AsyncIterator[OutputChunk]:
        """One answer, over a session of its own."""
        session = await self.open_session(config, len(ids) + config.new_tokens(len(ids)) + TREE_ROOM)
        try:
            async for chunk in await self.chunks(session, ids, config):
                yield chunk
        finally:
            session.close()


async def generate(
    session: Session,
    prompt: Sequence[int],
    config: GenerationConfig,
    tokenizer: Tokenizer | None = None,
    speculation: Speculation | None = None,
    grammar: GrammarMatcher | None = None,
) -> AsyncGenerator[OutputChunk, None]:
    """Chunks of the answer to `prompt`, which may continue or branch off what the session holds.

    Leaves the session so that `session.ids` are exactly prompt and answer, but for tokens that are not cached yet.
    Raises SettingsError for an empty or too long prompt, PeerError where the route fails.
    """
    positions = positions_for(session, prompt)
    limit = min(config.new_tokens(len(prompt)), positions - len(prompt) + 1)
    session.reshape = score_rules(config, len(prompt), limit, config.eos_ids(tokenizer))
    if session.reshape and not session.options.local_ends:
        named = ", ".join(name for name in NEED_SCORES if getattr(config, name) not in (None, 0, (), [], {}))
        raise SettingsError(f"{named}: the scores are needed on this machine, connect with local_ends=True")
    if grammar and session.options.local_ends:
        session.reshape = chained(session.reshape, masked(grammar.fresh(), len(prompt)))
    speculation = speculation or Speculation()
    cutter = OutputCutter(
        tokenizer, limit, config.eos_ids(tokenizer), config.stops, config.ending(prompt), config.visible_tokens
    )
    kept = common_prefix(session.ids, prompt[:-1])
    session.rewind(kept)
    started = time.perf_counter()
    done = Verified(await _prefill(session, prompt[kept:], config))
    speculation.start(prompt, config.sampling, grammar)
    ids = list(prompt)
    while True:
        result = done.result
        assert result.next_token is not None
        chunk = cutter.take([*result.path_ids, result.next_token], result)
        ids.extend(chunk.ids)
        chunk.seconds, chunk.nodes, chunk.draft_s = time.perf_counter() - started, done.nodes, done.draft_s
        chunk.events = session.take_events()
        if len(session.ids) > len(ids):
            session.rewind(len(ids))
        yield chunk
        if chunk.finish_reason:
            return
        started = time.perf_counter()
        room = min(positions - len(ids), session.room(len(ids))) if cutter.left > 1 else 0
        done = await speculation.round(session, ids, room, config.output)


def positions_for(session: Session, prompt: Sequence[int]) -> int:
    """How many tokens prompt and answer may have. Raises SettingsError where there is no room for an answer."""
    if not prompt:
        raise SettingsError("the prompt is empty")
    positions = min(session.context_length, session.options.reserve_tokens)
    if len(prompt) >= positions:
        raise SettingsError(f"a prompt of {len(prompt)} tokens leaves no room in {positions} positions")
    return positions


async def _prefill(session: Session, ids: Sequence[int], config: GenerationConfig) -> StepResult:
    """All of a prompt that the session lacks. Raises PeerError, NoRoute."""
    if config.output.logits and len(ids) > 1:  # those of the last row are enough
        await session.prefill(ids[:-1])
        ids = ids[-1:]
    return await session.prefill(ids, config.sampling, config.output)


def messages_in(prompt: Sequence[Any]) -> list[Mapping[str, Any]] | None:
    """A prompt's messages; None where it has none. Raises SettingsError for one without role and content, TypeError."""
    if not len(prompt) or not isinstance(prompt[0], Mapping):
        return None
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt):
        raise SettingsError("each message has a role and a content")
    return list(prompt)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of what both begin with."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
