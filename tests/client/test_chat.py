"""What a conversation holds after a turn, whatever became of it; what its session reserves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from petal.client.chat import AsyncChat
from petal.client.config import GenerationConfig
from petal.client.output import OutputChunk
from petal.client.routing.route import NoRoute

QUESTION = {"role": "user", "content": "a question"}


class Session:
    def __init__(self, reserve_tokens: int) -> None:
        self.options = SimpleNamespace(reserve_tokens=reserve_tokens, grammar=None)
        self.context_length = 8192
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Generator:
    """Says the words of `says`, and raises the exceptions among them. Templates want turns to alternate."""

    def __init__(self) -> None:
        self.tokenizer = self.connection = self
        self.says: list[str | Exception] = ["an ", "answer"]
        self.opened: list[Session] = []
        self.asked: list[tuple[int, int]] = []

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError(f"roles must alternate: {roles}")
        return [1] * sum(len(message["content"].split()) for message in messages)

    def config(self, settings: Any) -> GenerationConfig:
        return GenerationConfig(**settings)

    def grammar(self, config: GenerationConfig) -> None:
        return None

    async def open_session(self, config: GenerationConfig, tokens: int, *, spare_tokens: int) -> Session:
        self.asked.append((tokens, spare_tokens))
        self.opened.append(Session(tokens + spare_tokens))
        return self.opened[-1]

    async def chunks(self, session: Session, ids: list[int], config: GenerationConfig) -> AsyncIterator[OutputChunk]:
        async def said() -> AsyncIterator[OutputChunk]:
            for word in self.says:
                if isinstance(word, Exception):
                    raise word
                yield OutputChunk([1], word)

        return said()


@pytest.fixture
def generator() -> Generator:
    return Generator()


@pytest.fixture
def chat(generator: Generator) -> AsyncChat:
    return AsyncChat(generator)  # type: ignore[arg-type]


async def hear(answer: AsyncIterator[OutputChunk]) -> str:
    return "".join([chunk.text async for chunk in answer])


async def test_a_turn_is_kept_and_the_session_with_it(chat: AsyncChat, generator: Generator) -> None:
    assert await hear(chat.send("a question")) == "an answer"
    assert await hear(chat.send("another")) == "an answer"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert len(generator.opened) == 1


@pytest.mark.parametrize("failure", [NoRoute("nobody hosts block 3"), ValueError("leaves no room in 64 positions")])
async def test_a_turn_without_an_answer_is_undone(chat: AsyncChat, generator: Generator, failure: Exception) -> None:
    generator.says = [failure]
    with pytest.raises(type(failure)):
        await hear(chat.send("a question"))
    assert chat.messages == []
    generator.says = ["an answer"]
    assert await hear(chat.send("a question")) == "an answer"
    generator.says = [failure]
    with pytest.raises(type(failure)):
        await hear(chat.regenerate(seed=1))
    assert chat.messages == [QUESTION, {"role": "assistant", "content": "an answer"}]


async def test_a_refused_setting_changes_nothing(chat: AsyncChat, generator: Generator) -> None:
    await hear(chat.send("a question"))
    before = list(chat.messages)
    with pytest.raises(ValueError, match="top_p"):
        await hear(chat.send("another", temperature=1.0, top_p=7.0))
    assert chat.messages == before
    assert not generator.opened[0].closed
    assert await hear(chat.send("another")) == "an answer"


async def test_what_was_said_before_a_failure_stays(chat: AsyncChat, generator: Generator) -> None:
    generator.says = ["an ", NoRoute("nobody hosts block 3")]
    with pytest.raises(NoRoute):
        await hear(chat.send("a question"))
    assert chat.messages == [QUESTION, {"role": "assistant", "content": "an "}]
    assert generator.opened[0].closed


async def test_a_session_asks_for_what_it_needs_and_more_where_there_is_more(
    chat: AsyncChat, generator: Generator
) -> None:
    await hear(chat.send("a question", max_new_tokens=100))
    await hear(chat.send("another", max_new_tokens=5000))
    assert generator.asked == [(102, 3994), (5005, 0)]
    assert [session.closed for session in generator.opened] == [True, False]
