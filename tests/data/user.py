"""A user's program, as a type checker sees it: tests/test_typing.py checks it strictly, and nothing runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import petal
from petal import (
    AsyncSwarmModel,
    Chat,
    ConnectError,
    GenerationConfig,
    ModelClosed,
    NoRoute,
    OutputChunk,
    PeerError,
    PetalError,
    SettingsError,
    SwarmModel,
)


def ask(peers: Sequence[str]) -> str:
    with SwarmModel.connect("demo", initial_peers=peers, exact=True, wait_s=5) as model:
        chunks: Iterator[OutputChunk] = model.stream("Hi", temperature=0.8, seed=None, stop_strings=["."], budget=4)
        text = "".join(chunk.text for chunk in chunks)
        config = GenerationConfig(max_new_tokens=8, eos_token_id=-1)
        answers = model.generate([[1, 2], [3]], generation_config=config, num_beams=1, max_time=2.5)
        print(answers, model.name, model.route(), petal.__version__.upper())
        chat: Chat = model.chat(system="Be brief.")
        return text + "".join(chunk.text for chunk in chat.send("And you?", max_new_tokens=8))


async def ask_elsewhere() -> AsyncIterator[str]:
    model = await AsyncSwarmModel.connect("demo", ["127.0.0.1:31337"], codec="int8")
    async for chunk in model.stream([1, 2, 3], drafter="ngram"):
        yield chunk.text
    await model.close()


async def main() -> None:
    try:
        print([text async for text in ask_elsewhere()])
    except (ConnectError, NoRoute, PeerError, SettingsError, ModelClosed) as error:
        base: PetalError = error
        print(base)


asyncio.run(main())
