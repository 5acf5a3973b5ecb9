"""Anthropic's own SDK against a gateway of a live swarm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import pytest_asyncio

from .gateways import Bench, bench, scripted

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOOLS: Any = [
    {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {}}}},
    {"type": "web_search_20250305", "name": "web_search"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THINKING = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with bench(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(door: Bench) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=door.gateway.url, api_key="none", max_retries=0) as made:
        yield made


def asking(door: Bench, **changes: Any) -> Any:
    return {"model": door.model, "max_tokens": 12, "messages": [{"role": "user", "content": "Hi"}], **changes}


async def test_messages_say_what_a_plain_client_gets(door: Bench, client: anthropic.AsyncAnthropic) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = await door.plain.generate(messages, max_new_tokens=12, temperature=0.7, seed=3)
    asked = asking(door, system="Be brief.", extra_body={"temperature": 0.7, "seed": 3})
    message = await client.messages.create(**asked)
    assert [block.text for block in message.content if block.type == "text"] == [expected]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12
    async with client.messages.stream(**asked) as stream:
        assert "".join([piece async for piece in stream.text_stream]) == expected
        assert (await stream.get_final_message()).stop_reason == "max_tokens"


async def test_stop_sequences_are_named(door: Bench, client: anthropic.AsyncAnthropic) -> None:
    whole = await door.plain.generate([{"role": "user", "content": "Hi"}], max_new_tokens=12)
    stops = ["never said", whole[2:5]]
    asked = asking(door, stop_sequences=stops, extra_body={"temperature": 0})
    message = await client.messages.create(**asked)
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == whole[2:5]


async def test_thinking_and_tools(
    door: Bench, client: anthropic.AsyncAnthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, THINKING)
    asked = asking(door, tools=TOOLS)
    message = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        events = [event.type async for event in stream if event.type in RAW]
        streamed = await stream.get_final_message()
    for each in (message, streamed):
        assert [block.type for block in each.content] == ["thinking", "text", "tool_use"]
        thinking, text, tool = each.content
        assert (thinking.thinking, text.text) == ("Hm.\n", "Let me see.")
        assert (tool.name, tool.input) == ("weather", {"city": "Paris"})
        assert each.stop_reason == "tool_use"
    opened = [event for event in events if event != "content_block_delta"]
    assert opened == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": message.model_dump()["content"]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": tool.id, "content": [{"type": "text", "text": "Sunny"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    assert (await client.messages.create(**asking(door, messages=history, tools=TOOLS))).content


RAW = (
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop",
)  # fmt: skip


async def test_tokens_are_counted_as_they_are_used(door: Bench, client: anthropic.AsyncAnthropic) -> None:
    asked = {"model": door.model, "messages": [{"role": "user", "content": "Count me."}], "system": "Be brief."}
    counted = await client.messages.count_tokens(**asked)
    used = (await client.messages.create(**asked, max_tokens=1)).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


async def test_models_and_errors(door: Bench, client: anthropic.AsyncAnthropic) -> None:
    assert [model.id async for model in client.models.list()] == [door.model]
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.messages.create(**asking(door, model="claude-9"))
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="image"):
        await client.messages.create(**asking(door, messages=[{"role": "user", "content": [{"type": "image"}]}]))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await client.messages.create(**asking(door, max_tokens=0))
