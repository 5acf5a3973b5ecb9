"""Swarms for tests: real DHT nodes, real gRPC servers, real compute threads, in this process."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from petal.client.swarm import AsyncSwarmModel
from petal.peer.limits.rates import CallRates, Rate
from petal.peer.options import ServeOptions
from petal.peer.server import PeerServer

# For tests that call more often than strangers may.
NO_RATES = CallRates(Rate(1e9, 1e9), Rate(1e9, 1e9), Rate(1e9, 1e9))


@dataclass
class LocalSwarm:
    """Running peers; `connect` gives a client of theirs."""

    model: str
    peers: list[PeerServer]

    @property
    def address(self) -> str:
        return self.peers[0].address

    @asynccontextmanager
    async def connect(self, **options: Any) -> AsyncIterator[AsyncSwarmModel]:
        client = await AsyncSwarmModel.connect(self.model, [self.address], **{"wait_s": 20, **options})
        try:
            yield client
        finally:
            await client.close()


def spans(n_blocks: int, peers: int) -> list[range]:
    """Nearly equal spans, on purpose never quite equal where that is possible."""
    bounds = [i * n_blocks // peers for i in range(peers + 1)]
    return [range(bounds[i], bounds[i + 1]) for i in range(peers)]


@asynccontextmanager
async def local_swarm(
    model: str | Path, blocks: Sequence[range], join: str | None = None, **options: Any
) -> AsyncIterator[LocalSwarm]:
    """One peer for each span, in the DHT of the peer at `join`. Afterwards each pool must be whole and empty."""
    servers: list[PeerServer] = []
    with TemporaryDirectory(prefix="petal-test-") as folder:
        try:
            for i, span in enumerate(blocks):
                initial = (servers[0].address,) if servers else (join,) if join else ()
                server = PeerServer(
                    ServeOptions(
                        model=str(model),
                        blocks=span,
                        host="127.0.0.1",
                        initial_peers=initial,
                        identity=Path(folder) / f"identity-{i}",
                        publish_s=1.0,
                        **options,
                    )
                )
                await server.start()
                servers.append(server)
            yield LocalSwarm(str(model), servers)
        finally:
            # The first is everybody's way into the DHT: it leaves last.
            for server in reversed(servers):
                await server.stop()
    for server in servers:
        server.engine.check()
        assert server.engine.cache.free_pages == server.engine.cache.n_pages, "pages leaked"
        assert server.admission.sessions == 0, "a reservation leaked"
