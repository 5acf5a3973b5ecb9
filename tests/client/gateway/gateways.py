"""Gateways for tests: the application on loopback by uvicorn, in this process and loop."""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from petal.client.config import GenerationConfig
from petal.client.gateway.application import GatewayLimits
from petal.client.gateway.keys import KeyRecord, KeyRing
from petal.client.gateway.program import GatewayServer, served_model
from petal.client.generation import Generator
from petal.client.output import OutputChunk
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from transformers import LlamaForCausalLM

from ...support.byte_llama import save
from ...support.swarms import LocalSwarm, local_swarm
from ...support.tiny import tiny_llama

_FOLDER = tempfile.TemporaryDirectory(prefix="petal-gateway-")


@dataclass
class LocalGateway:
    """A running gateway; `http` is a client of it without a key."""

    url: str
    http: httpx.AsyncClient
    server: GatewayServer

    async def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **more)


@asynccontextmanager
async def local_gateway(
    model: str,
    address: str,
    *,
    keys: Sequence[KeyRecord] = (),
    limits: GatewayLimits | None = None,
    origins: Sequence[str] = (),
    **connect: Any,
) -> AsyncIterator[LocalGateway]:
    served = served_model(model, [address], **connect)
    server = GatewayServer([served], KeyRing(keys), limits or GatewayLimits(), origins)
    running = asyncio.create_task(server.run("127.0.0.1", 0))
    try:
        url = await server.started()
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            yield LocalGateway(url, http, server)
    finally:
        server.stop()
        await running


# The byte that ends a text, and how a byte-level tokenizer shows it.
END_ID = 5
END = chr(256 + END_ID)
TEMPLATE = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools> answer in <tool_call>' }}{% endif %}"
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '\n' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}{# <think> </think> #}"
)


def scripted(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """From now on every model says this, some characters at a time."""

    async def chunks(
        generator: Generator, session: Session, ids: Sequence[int], config: GenerationConfig
    ) -> AsyncGenerator[OutputChunk, None]:
        async def said() -> AsyncGenerator[OutputChunk, None]:
            for at in range(0, len(words), 5):
                last = at + 5 >= len(words)
                yield OutputChunk([0], words[at : at + 5], finish_reason="stop" if last else None)

        return said()

    monkeypatch.setattr(Generator, "chunks", chunks)


@functools.cache
def chatting_llama() -> Path:
    """A folder with a random Llama of four blocks that reads and writes bytes, and has a chat template."""
    folder = Path(_FOLDER.name)
    save(LlamaForCausalLM.from_pretrained(tiny_llama()), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": END}))
    return folder


@dataclass
class Bench:
    """A swarm, a plain client of it, and a gateway to it."""

    swarm: LocalSwarm
    plain: AsyncSwarmModel
    gateway: LocalGateway

    @property
    def model(self) -> str:
        return self.plain.name


@asynccontextmanager
async def bench(home: Path, **options: Any) -> AsyncIterator[Bench]:
    """Of the random model, at two peers; `home` is where clients keep what they know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home))
        async with (
            local_swarm(chatting_llama(), [range(0, 2), range(2, 4)]) as swarm,
            swarm.connect() as plain,
            local_gateway(swarm.model, swarm.address, **options) as gateway,
        ):
            yield Bench(swarm, plain, gateway)
