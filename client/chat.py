"""A conversation: one session kept across turns, so that only what is new is computed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from .config import GenerationConfig, GenerationSettings
from .event_loop import EventLoopThread
from .generation import Generator
from .output import OutputChunk
from .session.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncChat:
    """`messages` are as in OpenAI's API; change them freely between turns, the session follows.

    A turn that fails before it says anything is undone, its question included.
    """

    def __init__(self, generator: Generator, system: str | None = None, reserve_tokens: int = 4096) -> None:
        """`reserve_tokens`: what the session keeps room for, where the peers have it."""
        if generator.tokenizer is None:
            raise ValueError(f"a chat needs a tokenizer: {generator.lack}")
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._generator = generator
        self._tokenizer = generator.tokenizer
        self._reserve_tokens = reserve_tokens
        self._session: Session | None = None

    def send(self, text: str, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """Say something; chunks of the answer as they come. Raises ValueError, PeerError, NoRoute."""
        return self._answer(text, settings)

    def regenerate(self, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """Answer the last question again; give another seed for another answer."""
        return self._answer(None, settings)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.messages)} messages>"

    async def close(self) -> None:
        """Give the session's memory back to the peers; the messages stay, and so may the conversation."""
        if self._session:
            self._session.close()
            self._session = None

    async def _answer(self, question: str | None, settings: GenerationSettings) -> AsyncIterator[OutputChunk]:
        """One turn; without a question the last one is answered anew."""
        before, said = list(self.messages), ""
        messages = [*before, {"role": "user", "content": question}] if question is not None else list(before)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        # What is refused here leaves conversation and session as they are.
        config = self._generator.config(settings).alone()
        prompt = self._tokenizer.apply_chat_template(messages)
        session = await self._session_for(config, len(prompt) + config.new_tokens(len(prompt)))
        self.messages[:] = messages
        try:
            async for chunk in await self._generator.chunks(session, prompt, config):
                said += chunk.text
                yield chunk
        except BaseException:
            # Interrupted with a step in flight, or the route failed: what the peers hold is not known for sure.
            await self.close()
            if not said:
                self.messages[:] = before
                raise
            self.messages.append({"role": "assistant", "content": said})
            raise
        self.messages.append({"role": "assistant", "content": said})

    async def _session_for(self, config: GenerationConfig, tokens: int) -> Session:
        """The session of the turn before; another one where `tokens` do not fit into it, or its grammar is another."""
        held, grammar = self._session, self._generator.grammar(config)
        fits = held is not None and min(tokens, held.context_length) <= held.options.reserve_tokens
        if held is None or not fits or held.options.grammar != grammar:
            await self.close()
            spare = max(0, self._reserve_tokens - tokens)
            self._session = await self._generator.open_session(config, tokens, spare_tokens=spare)
            return self._session
        return held


class Chat:
    """AsyncChat for synchronous code; twins with a leading `a` are awaited in any event loop."""

    def __init__(self, core: AsyncChat, loop: EventLoopThread) -> None:
        self._core = core
        self._loop = loop

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as in OpenAI's API; change it freely between turns."""
        return self._core.messages

    @messages.setter
    def messages(self, messages: list[dict[str, str]]) -> None:
        self._core.messages = messages

    def send(self, text: str, **settings: Unpack[GenerationSettings]) -> Iterator[OutputChunk]:
        """Say something; chunks of the answer as they come. Raises ValueError, PeerError, NoRoute."""
        return self._loop.iterate(self._core.send(text, **settings))

    def asend(self, text: str, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """See `send`."""
        return self._loop.delegate_iteration(self._core.send(text, **settings))

    def regenerate(self, **settings: Unpack[GenerationSettings]) -> Iterator[OutputChunk]:
        """Answer the last question again; give another seed for another answer."""
        return self._loop.iterate(self._core.regenerate(**settings))

    def aregenerate(self, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """See `regenerate`."""
        return self._loop.delegate_iteration(self._core.regenerate(**settings))

    def close(self) -> None:
        """Give the session's memory back to the peers; nothing where the model is closed, which has done it."""
        if self._loop.runs:
            self._loop.run(self._core.close())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.messages)} messages>"
