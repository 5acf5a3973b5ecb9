"""A conversation: one session kept across turns, so that only what is new is computed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from .event_loop import BackgroundLoop
from .generation import Piece, generate
from .session.session import Session

if TYPE_CHECKING:
    from .swarm import AsyncSwarmModel


class Chat:
    """`messages` are as in OpenAI's API; change them freely between turns, the session follows."""

    def __init__(
        self, model: AsyncSwarmModel, loop: BackgroundLoop, system: str | None = None, reserve_tokens: int = 4096
    ) -> None:
        if model.tokenizer is None:
            raise ValueError("a chat needs a tokenizer")
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._model = model
        self._tokenizer = model.tokenizer
        self._loop = loop
        self._reserve_tokens = reserve_tokens
        self._session: Session | None = None

    def send(self, text: str, **settings: Any) -> Iterator[Piece]:
        """Say something; pieces of the answer as they come."""
        return self._loop.iterate(self._send(text, settings))

    def asend(self, text: str, **settings: Any) -> AsyncIterator[Piece]:
        return self._loop.delegate_iteration(self._send(text, settings))

    def regenerate(self, **settings: Any) -> Iterator[Piece]:
        """Answer the last question again; give another seed for another answer."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self._loop.iterate(self._answer(settings))

    def close(self) -> None:
        if self._session:
            self._loop.run(self._close())

    async def _close(self) -> None:
        if self._session:
            self._session.close()
            self._session = None

    async def _send(self, text: str, settings: dict[str, Any]) -> AsyncIterator[Piece]:
        self.messages.append({"role": "user", "content": text})
        async for piece in self._answer(settings):
            yield piece

    async def _answer(self, settings: dict[str, Any]) -> AsyncIterator[Piece]:
        config = self._model.config(**settings)
        prompt = self._tokenizer.apply_chat_template(self.messages)
        needed = len(prompt) + config.max_new_tokens
        if self._session is None or min(needed, self._session.context_length) > self._session.options.reserve_tokens:
            await self._close()
            self._session = await self._model.open_session(max(needed, self._reserve_tokens))
        said = ""
        try:
            speculation = await self._model.speculation(config, self._session)
            async for piece in generate(self._session, prompt, config, self._tokenizer, speculation):
                said += piece.text
                yield piece
        except BaseException:
            # Interrupted with a step in flight, or the route failed: what the peers hold is not known for sure.
            await self._close()
            raise
        finally:
            self.messages.append({"role": "assistant", "content": said})
