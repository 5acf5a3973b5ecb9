"""What a gateway refuses: the right status, the API's own error object, and everybody else goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from petal.client.gateway import body, http_protocol, reply
from petal.client.gateway.application import GatewayLimits
from petal.client.gateway.keys import KeyRecord, KeyRing, digest_of
from petal.client.gateway.program import GatewayError, check_place

from ...support.swarms import local_swarm
from .gateways import Bench, bench, local_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with bench(tmp_path_factory.mktemp("home")) as made:
        yield made


def asking(door: Bench, **changes: Any) -> dict[str, Any]:
    asked = {"model": door.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **changes}
    return {name: value for name, value in asked.items() if value is not ...}


def refusal(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    said = answer.json()["error"]
    assert answer.status_code == status, said
    assert set(said) == {"message", "type", "param", "code"}
    for word in words:
        assert word in said["message"]
    return said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": ...}, ["messages"]),
        ({"messages": []}, ["messages"]),
        ({"messages": "Hi"}, ["messages"]),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, ["messages.0.role"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url"]),
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": 3}, ["temperature"]),
        ({"temperature": -1}, ["temperature"]),
        ({"top_p": 0}, ["top_p"]),
        ({"n": 0}, ["n"]),
        ({"n": 1000}, ["n"]),
        ({"max_tokens": -5}, ["max_tokens"]),
        ({"max_tokens": 10**30}, ["max_tokens"]),
        ({"seed": 1 << 70}, ["seed"]),
        ({"stop": [""]}, ["stop"]),
        ({"stop": ["a"] * 99}, ["stop"]),
        ({"top_logprobs": 3}, ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 99}, ["top_logprobs"]),
        ({"stream_options": {"include_usage": True}}, ["stream"]),
        ({"audio": {"voice": "x"}}, ["audio", "not supported"]),
        ({"temprature": 1}, ["temprature", "temperature"]),
    ],
)
async def test_bad_fields_are_named(door: Bench, changes: dict[str, Any], words: list[str]) -> None:
    said = refusal(await door.gateway.post(CHAT, asking(door, **changes)), 400, *words)
    assert said["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b'{"temperature": Infinity}',
        b"[" * 100_000, b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)  # fmt: skip
async def test_bad_json(door: Bench, raw: bytes) -> None:
    refusal(await door.gateway.http.post(CHAT, content=raw), 400)


async def test_unknown_model_and_paths(door: Bench) -> None:
    said = refusal(await door.gateway.post(CHAT, asking(door, model="gpt-9")), 404, "gpt-9", door.model)
    assert said["code"] == "model_not_found"
    refusal(await door.gateway.http.get("/v1/models/gpt-9"), 404, "gpt-9")
    refusal(await door.gateway.http.get("/v1/nothing"), 404, "/v1/nothing")
    refusal(await door.gateway.http.get(CHAT), 405, "GET")


async def test_context_overflow_says_by_how_much(door: Bench) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    said = refusal(await door.gateway.post(CHAT, asking(door, messages=long)), 400, "context of 512", "too long")
    assert said["code"] == "context_length_exceeded"
    over = len("<user>" + "x" * 600 + "\n<assistant>") - 511
    assert f"{over} too long" in said["message"]
    ids = {"model": door.model, "prompt": [1, 300], "max_tokens": 1}
    refusal(await door.gateway.post("/v1/completions", ids), 400, "300", "vocabulary")


async def test_large_bodies(door: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(await door.gateway.http.post(CHAT, content=b"x" * (10 << 20)), 413, "bytes")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * (1 << 20)

    monkeypatch.setattr(body, "HEARD_BYTES", 12 << 20)
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the answer may be lost with the connection
        refusal(await door.gateway.http.post(CHAT, content=endless()), 413, "bytes")
    assert (await door.gateway.post(CHAT, asking(door))).status_code == 200


async def test_slow_bodies_and_headers(door: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.2)
    monkeypatch.setattr(http_protocol, "HEADER_S", 0.2)
    host, port = door.gateway.url.removeprefix("http://").split(":")

    async def said_to(beginning: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(beginning)
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()

    assert await said_to(b"POST /v1/chat/completions HTTP/1.1\r\nHo") == b""
    request = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 9\r\nConnection: close\r\n\r\n{{"
    assert (await said_to(request.encode())).startswith(b"HTTP/1.1 408")


async def test_keys_are_asked_for(door: Bench) -> None:
    key = KeyRecord("lab", digest_of("petal-secret"), requests_per_minute=2)
    async with local_gateway(door.swarm.model, door.swarm.address, keys=[key]) as gateway:
        said = refusal(await gateway.post(CHAT, asking(door)), 401, "API key")
        assert said["code"] == "invalid_api_key"
        bad = {"authorization": "Bearer petal-guess"}
        refusal(await gateway.post(CHAT, asking(door), headers=bad), 401, "not known")
        good = {"authorization": "Bearer petal-secret"}
        assert (await gateway.post(CHAT, asking(door), headers={"x-api-key": "petal-secret"})).status_code == 200
        assert (await gateway.post(CHAT, asking(door), headers=good)).status_code == 200
        limited = await gateway.post(CHAT, asking(door), headers=good)
        refusal(limited, 429, "2 requests a minute")
        assert int(limited.headers["retry-after"]) >= 1
        assert (await gateway.http.get("/health")).json()["status"] == "ok"


async def test_pages_of_other_origins_may_not_call(door: Bench) -> None:
    evil = await door.gateway.post(CHAT, asking(door), headers={"origin": "https://evil.example"})
    refusal(evil, 403, "evil.example")
    refusal(await door.gateway.post(CHAT, asking(door), headers={"host": "evil.example"}), 403, "evil.example")
    own = await door.gateway.post(CHAT, asking(door), headers={"origin": door.gateway.url})
    assert own.status_code == 200
    page = "https://page.example"
    async with local_gateway(door.swarm.model, door.swarm.address, origins=[page]) as gateway:
        asked = {"origin": page, "access-control-request-method": "POST"}
        assert (await gateway.http.options(CHAT, headers=asked)).headers["access-control-allow-origin"] == page
        assert (await gateway.post(CHAT, asking(door), headers={"origin": page})).status_code == 200


async def test_queue_is_bounded(door: Bench) -> None:
    limits = GatewayLimits(running=1, waiting=1, patience_s=30)
    async with local_gateway(door.swarm.model, door.swarm.address, limits=limits) as gateway:
        answers = await asyncio.gather(*(gateway.post(CHAT, asking(door, max_tokens=40)) for _ in range(5)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 429, 429, 429]
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
        assert (await gateway.post(CHAT, asking(door))).status_code == 200


async def held_sessions(door: Bench) -> int:
    return max(peer.admission.sessions for peer in door.swarm.peers)


async def eventually(door: Bench, sessions: int, within_s: float) -> bool:
    for _ in range(int(within_s / 0.01)):
        if await held_sessions(door) <= sessions:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_who_hangs_up_leaves_nothing_behind(door: Bench) -> None:
    async with local_gateway(door.swarm.model, door.swarm.address) as gateway:
        before = await held_sessions(door)
        asked = asking(door, max_tokens=400, stream=True)
        async with gateway.http.stream("POST", CHAT, json=asked) as answer:
            await anext(answer.aiter_lines())
            assert await held_sessions(door) == before + 1
        assert await eventually(door, before, 1.0)
        with pytest.raises(httpx.ReadTimeout):
            await gateway.post(CHAT, asking(door, max_tokens=400), timeout=0.05)
        assert await eventually(door, before, 1.0)


async def test_streams_end_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "UNREAD_S", 0.05)
    ended = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
        finally:
            ended.set()

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            await never()

    await reply.StreamedResponse(pieces(), "text/event-stream")({"type": "http"}, never, send)
    assert ended.is_set()
    assert len(sent) == 3


@pytest.mark.full
async def test_who_reads_nothing_is_let_go(door: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "UNREAD_S", 0.2)
    async with local_gateway(door.swarm.model, door.swarm.address) as gateway:
        before = await held_sessions(door)
        host, port = gateway.url.removeprefix("http://").split(":")
        sent = json.dumps(asking(door, max_tokens=450, n=8, temperature=1, stream=True, logprobs=True, top_logprobs=20))
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(sent)}\r\n\r\n"
        with contextlib.closing(writer):
            writer.write((head + sent).encode())
            for _ in range(500):
                await asyncio.sleep(0.01)
                if await held_sessions(door) == before + 8:
                    break
            assert await eventually(door, before, 60.0)
            assert reader


async def test_incomplete_swarm_is_answered_with_the_gap(door: Bench) -> None:
    async with local_swarm(door.swarm.model, [range(0, 2)]) as half, local_gateway(half.model, half.address) as gateway:
        answer = await gateway.post(CHAT, asking(door, model=half.model))
        refusal(answer, 503, "blocks 2-3", "since")
        assert "retry-after" in answer.headers
        assert (await gateway.http.get("/v1/models")).json()["data"][0]["unavailable"]
        assert "blocks 2-3" in (await gateway.http.get("/health")).text
        async with local_swarm(door.swarm.model, [range(2, 4)], join=half.address):
            for _ in range(60):
                answer = await gateway.post(CHAT, asking(door))
                if answer.status_code == 200:
                    break
                await asyncio.sleep(0.25)
            assert answer.status_code == 200


async def test_strangers_need_keys() -> None:
    with pytest.raises(GatewayError, match="keys"):
        check_place("0.0.0.0", 0, KeyRing())
    keys = KeyRing([KeyRecord("lab", digest_of("petal-secret"))])
    assert check_place("0.0.0.0", 0, keys) == "0.0.0.0"
    assert check_place("localhost", 0, KeyRing()) in ("127.0.0.1", "::1")
