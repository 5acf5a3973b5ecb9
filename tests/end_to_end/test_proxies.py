"""A proxy for the web is none for peers."""

from __future__ import annotations

import pytest

from ..support.swarms import local_swarm, spans
from ..support.tiny import tiny_llama


async def test_peers_are_dialed_directly_whatever_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with local_swarm(tiny_llama(), spans(4, 2)) as swarm, swarm.connect() as client:
        assert len(await client.generate([5, 6, 7], max_new_tokens=4, eos_token_id=-1)) == 7
