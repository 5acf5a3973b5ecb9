"""A model as its users hold it: what it takes, what it says of itself, and what becomes of it once it is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from petal import AsyncSwarmModel, ModelClosed, PeerError, PetalError, SettingsError, SwarmModel
from petal.client.connection import TREE_ROOM

from ..support.byte_llama import new_llama, save
from ..support.swarms import LocalSwarm, local_swarm

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": -1}
HELLO = [{"role": "user", "content": "Hello"}]
RENDERED = "user: Hello assistant:"
# What a session of a short prompt takes, and not much more.
SMALL = 8 + 4 + TREE_ROOM + 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(new_llama(32, 2), tmp_path_factory.mktemp("bytes"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm(folder: Path) -> AsyncIterator[LocalSwarm]:
    async with local_swarm(folder, [range(2)], cache_tokens=SMALL) as swarm:
        yield swarm


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def model(swarm: LocalSwarm) -> AsyncIterator[AsyncSwarmModel]:
    async with swarm.connect() as model:
        yield model


@pytest.mark.asyncio(loop_scope="module")
async def test_messages_are_a_prompt(model: AsyncSwarmModel) -> None:
    expected = await model.generate(RENDERED, **SETTINGS)
    assert await model.generate(HELLO, **SETTINGS) == expected
    assert await model.generate([HELLO, HELLO], **SETTINGS) == [expected, expected]
    assert await model.generate([HELLO, RENDERED], **SETTINGS) == [expected, expected]
    assert "".join([chunk.text async for chunk in model.stream(HELLO, **SETTINGS)]) == expected


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (b"Hello", "not bytes: decode it first"),
        ([b"Hello"], "not bytes: decode it first"),
        (bytearray(b"Hello"), "not bytes: decode it first"),
        ([1.5, 2.0], "a prompt is text, messages or token ids"),
        ([[1.5]], "a prompt is text, messages or token ids"),
        ([["a", "b"]], "a prompt is text, messages or token ids"),
        ([[[1, 2]]], "a prompt is text, messages or token ids"),
        ([{"content": "Hello"}, 5], "each message has a role and a content"),
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([], "there is no prompt"),
        ({"role": "user"}, "has input_ids"),
    ],
)
async def test_what_is_no_prompt_is_refused(model: AsyncSwarmModel, prompt: Any, sentence: str) -> None:
    with pytest.raises(PetalError, match=sentence):
        await model.generate(prompt, **SETTINGS)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prompt_that_fails_alone(model: AsyncSwarmModel) -> None:
    heard = []
    found = await model.generate(
        [[1, 2], [], [3, 4]], return_exceptions=True, progress=lambda *done: heard.append(done), **SETTINGS
    )
    assert found[0] == await model.generate([1, 2], **SETTINGS)
    assert found[2] == await model.generate([3, 4], **SETTINGS)
    assert isinstance(found[1], SettingsError)
    assert heard == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(SettingsError, match="rows of a tensor hold no errors"):
        await model.generate(torch.tensor([[1, 2]]), return_exceptions=True)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_chat_on_a_small_cache(model: AsyncSwarmModel) -> None:
    """It would like 4,096 tokens, and takes what there is."""
    chat = model.chat()
    for words in ("Hi", "Oh"):
        said = [chunk async for chunk in chat.send(words, max_new_tokens=4, eos_token_id=-1)]
        assert sum(len(chunk.ids) for chunk in said) == 4
    assert chat._session
    assert chat._session.options.reserve_tokens <= SMALL
    await chat.close()
    with pytest.raises(PeerError, match="never fit this peer's cache"):
        await model.open_session(SMALL + 64, wait_s=0)


@pytest.mark.asyncio(loop_scope="module")
async def test_it_says_what_it_is(swarm: LocalSwarm, model: AsyncSwarmModel, folder: Path) -> None:
    assert repr(model) == f"<AsyncSwarmModel {folder.name}: 2 blocks, 1 peers>"
    chat = model.chat("Be brief.")
    assert repr(chat) == "<AsyncChat: 1 messages>"
    route = await model.route()
    assert repr(route) == f"(<Stop {route[0].name}>,)"
    session = await model.open_session(32)
    assert repr(session) == f"<Session of 0 tokens: {route[0].name}>"
    session.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_model_that_was_closed(swarm: LocalSwarm, folder: Path) -> None:
    def work() -> None:
        with SwarmModel.connect(str(folder), [swarm.address], wait_s=20) as model:
            chat = model.chat()
            stream = model.stream("Hi", **SETTINGS)
            assert next(stream).ids
            assert repr(model) == f"<SwarmModel {folder.name}: 2 blocks, 1 peers>"
        model.close()
        chat.close()
        stream.close()  # type: ignore[attr-defined]
        assert repr(model) == f"<SwarmModel {folder.name}: closed>"
        again = (
            lambda: model.generate("Hi"),
            lambda: next(model.stream("Hi")),
            lambda: next(chat.send("Hi")),
            model.route,
        )
        for use in again:
            with pytest.raises(ModelClosed, match="the model is closed: connect again"):
                use()

    await asyncio.to_thread(work)  # this loop serves the peers
    async with swarm.connect() as core:
        chat = core.chat()
        assert [chunk async for chunk in chat.send("Hi", **SETTINGS)]
        await core.close()
        await core.close()
        for attempt in (core.generate("Hi"), core.route(), core.open_session(8)):
            with pytest.raises(ModelClosed, match="the model is closed: connect again"):
                await attempt
        await chat.close()
