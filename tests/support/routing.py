"""A directory and a network that say what a test wants, and who is used then."""

from __future__ import annotations

from typing import Any

import pytest
from petal.client.routing import peers as known_peers
from petal.client.routing.peers import KnownPeers
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.directory import Directory, DirectoryError, Pong


class Book(Directory):
    """A directory of what the test says."""

    def __init__(self) -> None:
        self.records: dict[str, pb.PeerRecord] = {}
        self.error: DirectoryError | None = None

    def publish(self, name: str, version: int, **fields: Any) -> None:
        good = {"peer_id": name, "addresses": [name], "n_blocks": 1, "end": 1, "state": pb.ONLINE}
        self.records[name] = pb.PeerRecord(**{**good, "model_digest": b"m", "version": version, **fields})

    async def list(self, model: str | None = None) -> Any:
        if self.error:
            raise self.error
        return list(self.records.values())

    async def close(self) -> None:
        pass


class Network:
    """Who answers pings, and who was pinged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.silent: set[str] = set()
        self.pinged: list[str] = []
        monkeypatch.setattr(known_peers, "ping_all", self._ping_all)

    async def _ping_all(self, records: Any, trust: Any, **_: Any) -> dict[str, Pong | None]:
        names = [record.peer_id for record in records]
        self.pinged += names
        return {name: None if name in self.silent else Pong(name, pb.ONLINE, 0.01) for name in names}


def names(peers: KnownPeers) -> set[str]:
    return {record.peer_id for record in peers.usable()}
