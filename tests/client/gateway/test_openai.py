"""OpenAI's own SDK against a gateway of a live swarm: what it gets is what a plain client gets."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio

from .gateways import Bench, bench, scripted

pytestmark = pytest.mark.asyncio(loop_scope="module")
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with bench(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(door: Bench) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


SAMPLED = {"temperature": 0.8, "seed": 5}


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, SAMPLED, {**SAMPLED, "presence_penalty": 0.7}])
async def test_chat_says_what_a_plain_client_gets(door: Bench, client: openai.AsyncOpenAI, settings: Any) -> None:
    expected = await door.plain.generate(MESSAGES, max_new_tokens=24, **settings)
    asked = {"model": door.model, "messages": MESSAGES, "max_completion_tokens": 24, **settings}
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected != ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    pieces = [piece async for piece in await client.chat.completions.create(**asked, stream=True)]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert pieces[0].choices[0].delta.role == "assistant"


async def test_stream_tells_usage_where_asked(door: Bench, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=door.model, messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = [piece async for piece in stream]
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    assert last.usage.total_tokens == last.usage.prompt_tokens + 5


async def test_choices_are_the_sequences_of_one_seed(door: Bench, client: openai.AsyncOpenAI) -> None:
    asked = {"model": door.model, "messages": MESSAGES, "max_tokens": 12, "n": 3, **SAMPLED}
    answer = await client.chat.completions.create(**asked)
    expected = await door.plain.generate(MESSAGES, max_new_tokens=12, num_return_sequences=3, **SAMPLED)
    assert [choice.message.content for choice in answer.choices] == expected
    assert len(set(expected)) == 3
    said = {0: "", 1: "", 2: ""}
    async for piece in await client.chat.completions.create(**asked, stream=True):
        said[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert [*said.values()] == expected


async def test_without_a_seed_answers_differ(door: Bench, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": door.model, "messages": MESSAGES, "max_tokens": 16, "temperature": 1.5}
    answers = [await client.chat.completions.create(**asked) for _ in range(2)]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content


async def test_stop_string_ends_the_answer(door: Bench, client: openai.AsyncOpenAI) -> None:
    whole = await door.plain.generate(MESSAGES, max_new_tokens=24)
    stop = whole[3:6]
    asked: Any = {"model": door.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "stop": [stop]}
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


async def test_logprobs_are_those_of_the_scores(door: Bench, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=door.model, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3, **SAMPLED
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == 4
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    chunks = [chunk async for chunk in door.plain.stream(MESSAGES, max_new_tokens=4, top_logprobs=3, **SAMPLED)]
    expected = [row.chosen for chunk in chunks for row in chunk.logprobs]
    assert np.allclose([token.logprob for token in tokens], expected, atol=1e-4)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in tokens)
    assert math.isclose(tokens[0].top_logprobs[1].logprob, chunks[0].logprobs[0].top[1].logprob, abs_tol=1e-4)


async def test_completions_of_text_and_ids(door: Bench, client: openai.AsyncOpenAI) -> None:
    expected = await door.plain.generate("Once upon", max_new_tokens=10)
    for prompt in ("Once upon", list(b"Once upon")):
        answer = await client.completions.create(model=door.model, prompt=prompt, max_tokens=10, temperature=0)
        assert answer.choices[0].text == expected
    several = await client.completions.create(
        model=door.model, prompt=["Once upon", "a time"], max_tokens=10, temperature=0, echo=True, logprobs=None
    )
    assert several.choices[0].text == f"Once upon{expected}"
    assert several.choices[1].text.startswith("a time")
    scored = await client.completions.create(
        model=door.model, prompt="Once upon", max_tokens=3, temperature=0, logprobs=2
    )
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.tokens or ()) == 3
    assert scored.usage is not None
    assert scored.usage.prompt_tokens == len("Once upon")
    streamed = await client.completions.create(
        model=door.model, prompt="Once upon", max_tokens=10, temperature=0, stream=True
    )
    assert "".join([piece.choices[0].text async for piece in streamed if piece.choices]) == expected


async def test_models_are_listed(door: Bench, client: openai.AsyncOpenAI) -> None:
    listed = await client.models.list()
    assert [model.id for model in listed.data] == [door.model]
    assert (await client.models.retrieve(door.model)).id == door.model
    raw = (await door.gateway.http.get("/v1/models")).json()
    assert raw["models"][0]["slug"] == door.model
    assert raw["data"][0]["context_length"] == 512


async def test_conversation_that_grows_is_not_read_again(door: Bench, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": door.model, "max_tokens": 8, "temperature": 0}
    opening = [*MESSAGES, {"role": "user", "content": "A beginning that nobody else has made so far."}]
    first = await client.chat.completions.create(messages=opening, **asked)
    grown = [*opening, {"role": "user", "content": "More."}]
    second = await client.chat.completions.create(messages=grown, **asked)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - len("<assistant>") - 1
    assert second.choices[0].message.content == await door.plain.generate(grown, max_new_tokens=8)


async def test_tools_and_reasoning(door: Bench, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    scripted(monkeypatch, f"<think>Hm.</think>Let me see.\n{call}\n{call}")
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    asked: Any = {"model": door.model, "messages": MESSAGES, "tools": tools}
    message = (await client.chat.completions.create(**asked)).choices[0]
    assert message.finish_reason == "tool_calls"
    assert message.message.content == "Let me see."
    assert message.message.model_extra == {"reasoning_content": "Hm."}
    calls = message.message.tool_calls or []
    assert [call.function.arguments for call in calls] == ['{"city": "Paris"}'] * 2
    pieces = [piece.choices[0] async for piece in await client.chat.completions.create(**asked, stream=True)]
    deltas = [call for piece in pieces for call in piece.delta.tool_calls or ()]
    for index in (0, 1):
        mine = [call for call in deltas if call.index == index]
        assert mine[0].function.name == "weather"
        assert "".join(call.function.arguments or "" for call in mine) == '{"city": "Paris"}'
    assert pieces[-1].finish_reason == "tool_calls"
    one = await client.chat.completions.create(**asked, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or ()) == 1
    none = await client.chat.completions.create(**asked, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    results: Any = [
        *MESSAGES,
        message.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "Sunny"},
    ]
    assert (await client.chat.completions.create(**{**asked, "messages": results})).choices


SHAPE: Any = {
    "type": "object",
    "properties": {"kind": {"enum": ["lion", "cat"]}, "size": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


async def test_answers_have_the_format_that_is_asked_for(door: Bench, client: openai.AsyncOpenAI) -> None:
    expected = await door.plain.generate(MESSAGES, max_new_tokens=64, json_schema=SHAPE, temperature=1.0, seed=7)
    assert json.loads(expected)["kind"] in ("lion", "cat")
    format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SHAPE, "strict": True}}
    asked: Any = {"model": door.model, "temperature": 1.0, "seed": 7, "max_tokens": 64}
    answer = await client.chat.completions.create(messages=MESSAGES, response_format=format, **asked)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": SHAPE}}
    response = await client.responses.create(
        model=door.model, input=MESSAGES, text=text, temperature=1.0, extra_body={"seed": 7}, max_output_tokens=64
    )
    assert response.output_text == expected
    native = {"model": door.model, "messages": MESSAGES, "format": SHAPE, "stream": False}
    native["options"] = {"temperature": 1.0, "seed": 7, "num_predict": 64}
    assert (await door.gateway.post("/api/chat", native)).json()["message"]["content"] == expected
    empty = await client.chat.completions.create(messages=MESSAGES, response_format={"type": "json_object"}, **asked)
    assert (empty.choices[0].message.content or "").startswith("{")
    impossible = {"type": "integer", "minimum": 3, "maximum": 1}
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": impossible}}
    with pytest.raises(openai.BadRequestError, match="minimum"):
        await client.chat.completions.create(messages=MESSAGES, response_format=bad, **asked)


async def test_biases(door: Bench, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=door.model, messages=MESSAGES, max_tokens=5, logit_bias={str(ord("q")): 100}
    )
    assert answer.choices[0].message.content == "qqqqq"
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        await client.chat.completions.create(model=door.model, messages=MESSAGES, logit_bias={"x": 1})
