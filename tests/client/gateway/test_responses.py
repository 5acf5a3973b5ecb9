"""OpenAI's Responses API by its own SDK, and as agents use it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from petal.client.gateway.body import parse_body
from petal.client.gateway.responses.request import ResponsesRequest

from .gateways import Bench, bench, scripted

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "web_search"},
    {"type": "namespace", "name": "x"},
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with bench(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(door: Bench) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_a_response_says_what_a_plain_client_gets(door: Bench, client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = await door.plain.generate(messages, max_new_tokens=12, temperature=0.7, seed=3)
    asked: Any = {"model": door.model, "instructions": "Be brief.", "input": "Hi", "max_output_tokens": 12}
    asked |= {"temperature": 0.7, "extra_body": {"seed": 3}}
    response = await client.responses.create(**asked)
    assert response.output_text == expected
    assert response.status == "incomplete"
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    events = [event async for event in await client.responses.create(**asked, stream=True)]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if not event.type.endswith("delta")]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert events[-1].response.output_text == expected


async def test_a_response_follows_another(door: Bench, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=door.model, input="Hi", max_output_tokens=6, temperature=0)
    asked: Any = {"model": door.model, "max_output_tokens": 6, "temperature": 0}
    second = await client.responses.create(input="More", previous_response_id=first.id, **asked)
    whole: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More"},
    ]
    assert second.output_text == (await client.responses.create(input=whole, **asked)).output_text
    assert second.output_text == await door.plain.generate(whole, max_new_tokens=6)
    with pytest.raises(openai.NotFoundError, match="resp_none"):
        await client.responses.create(input="More", previous_response_id="resp_none", **asked)


async def test_calls_and_their_results(
    door: Bench, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, '<think>Hm.</think>I look.<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>')
    asked: Any = {"model": door.model, "input": "Hi", "tools": TOOLS}
    response = await client.responses.create(**asked)
    events = [event async for event in await client.responses.create(**asked, stream=True)]
    for each in (response, events[-1].response):
        assert [item.type for item in each.output] == ["reasoning", "message", "function_call"]
        assert (each.output[2].name, each.output[2].arguments) == ("weather", '{"a": 1}')
        assert each.status == "completed"
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"a": 1}'
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        *[item.model_dump() for item in response.output],
        {"type": "function_call_output", "call_id": response.output[2].call_id, "output": "Sunny"},
        {"type": "web_search_call", "id": "x", "status": "completed"},
    ]
    assert (await client.responses.create(model=door.model, input=items, tools=TOOLS)).output


async def test_probes_and_what_agents_send(door: Bench, client: openai.AsyncOpenAI) -> None:
    probe = await client.responses.create(model=door.model, input=[])
    assert (probe.status, probe.output) == ("completed", [])
    events = [event async for event in await client.responses.create(model=door.model, input="", stream=True)]
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.completed"]
    agent = {
        "model": door.model,
        "instructions": "You are a coding agent.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [*TOOLS, {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "max_output_tokens": 3,
    }
    answer = await door.gateway.post("/v1/responses", agent)
    assert answer.status_code == 200
    assert "event: response.incomplete" in answer.text
    refused = await door.gateway.post("/v1/responses", {**agent, "background": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "background"


async def test_an_empty_message_of_the_assistant_behind_another_is_none() -> None:
    said = [{"role": "assistant", "content": text} for text in ("Hello.", "")]
    asked = parse_body(json.dumps({"model": "m", "input": said}).encode(), ResponsesRequest)
    assert [message["content"] for message in asked.messages()] == ["Hello."]
