"""Ollama's own SDK against a gateway of a live swarm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import ollama
import pytest
import pytest_asyncio

from .gateways import Bench, bench, scripted

pytestmark = pytest.mark.asyncio(loop_scope="module")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
OPTIONS = {"num_predict": 12, "temperature": 0.7, "seed": 3, "num_ctx": 4096}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with bench(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(door: Bench) -> AsyncIterator[ollama.AsyncClient]:
    made = ollama.AsyncClient(host=door.gateway.url)
    yield made
    await made._client.aclose()


async def test_chat_says_what_a_plain_client_gets(door: Bench, client: ollama.AsyncClient) -> None:
    expected = await door.plain.generate(MESSAGES, max_new_tokens=12, temperature=0.7, seed=3)
    answer = await client.chat(door.model, MESSAGES, options=OPTIONS)
    assert answer.message.content == expected
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 12)
    pieces = [
        piece async for piece in await client.chat(f"{door.model}:latest", MESSAGES, options=OPTIONS, stream=True)
    ]
    assert "".join(piece.message.content or "" for piece in pieces) == expected
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


async def test_generate_by_template_and_raw(door: Bench, client: ollama.AsyncClient) -> None:
    templated = await client.generate(door.model, "Hi", options=OPTIONS)
    assert templated.response == await door.plain.generate(MESSAGES, max_new_tokens=12, temperature=0.7, seed=3)
    raw = await client.generate(door.model, "Hi", raw=True, options=OPTIONS)
    assert raw.response == await door.plain.generate("Hi", max_new_tokens=12, temperature=0.7, seed=3)
    assert (await client.generate(door.model)).done_reason == "load"
    assert (await client.chat(door.model)).done_reason == "load"


async def test_thinking_and_tools(door: Bench, client: ollama.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    scripted(monkeypatch, f"<think>Hm.</think>{call}{call}")
    answer = await client.chat(door.model, MESSAGES, tools=TOOLS)
    pieces = [piece async for piece in await client.chat(door.model, MESSAGES, tools=TOOLS, stream=True)]
    assert answer.message.thinking == "".join(piece.message.thinking or "" for piece in pieces) == "Hm."
    streamed = [call for piece in pieces for call in piece.message.tool_calls or ()]
    for calls in (answer.message.tool_calls, streamed):
        assert [(call.function.name, call.function.arguments) for call in calls or ()] == [
            ("weather", {"city": "Paris"})
        ] * 2


async def test_lists_and_errors(door: Bench, client: ollama.AsyncClient) -> None:
    assert [model.model for model in (await client.list()).models] == [door.model]
    assert [model.model for model in (await client.ps()).models] == [door.model]
    assert "tools" in ((await client.show(door.model)).capabilities or ())
    assert (await door.gateway.http.get("/api/version")).json()["version"]
    with pytest.raises(ollama.ResponseError, match="no model 'llama9'"):
        await client.chat("llama9", MESSAGES)
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        await client.chat(door.model, MESSAGES, options={"mirostat": 2})
    answer = await door.gateway.post("/api/chat", {"model": door.model, "messages": 3})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
