"""Private swarms for tests: a real admin, real peers and clients of theirs, in this process."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from petal.client.swarm import AsyncSwarmModel
from petal.peer.options import ServeOptions
from petal.peer.server import PeerServer
from petal.protocol.private.admin import AdminServer
from petal.protocol.private.authority import Authority


def free_ports() -> int:
    """A port that is free, as the one above it is."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@contextmanager
def home(folder: Path) -> Iterator[None]:
    """Meanwhile memberships are kept in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield


@dataclass
class PrivateSwarm:
    """One admin; whoever else has joined."""

    model: str
    folder: Path
    authority: Authority
    admin: AdminServer
    peers: list[PeerServer] = field(default_factory=list)

    def invite(self, role: str = "peer", uses: int = 1, lifetime_s: float = 3600, **labels: str) -> str:
        return self.authority.invite(role, labels, uses, lifetime_s)

    async def serve(self, blocks: range, token: str | None = None, **options: Any) -> PeerServer:
        """One more peer."""
        token = token or self.invite()
        settings = {"host": "127.0.0.1", "publish_s": 1.0, "identity": self.folder / f"peer-{len(self.peers)}"}
        peer = PeerServer(ServeOptions(self.model, blocks=blocks, join=token, **{**settings, **options}))
        await peer.start()
        self.peers.append(peer)
        return peer

    @asynccontextmanager
    async def connect(self, name: str = "client", **options: Any) -> AsyncIterator[AsyncSwarmModel]:
        """A client with a home of its own."""
        options = {"join": self.invite("client"), "wait_s": 20, **options}
        with home(self.folder / name):
            client = await AsyncSwarmModel.connect(self.model, **options)
        try:
            yield client
        finally:
            await client.close()


@asynccontextmanager
async def private_swarm(model: str | Path, blocks: Sequence[range] = (), **options: Any) -> AsyncIterator[PrivateSwarm]:
    """An admin and one peer for each span. Afterwards each pool must be whole and empty."""
    with TemporaryDirectory(prefix="petal-test-") as folder:
        authority = Authority.init("lab", f"127.0.0.1:{free_ports()}", Path(folder) / "admin" / "lab")
        admin = AdminServer(authority, "127.0.0.1")
        await admin.start()
        swarm = PrivateSwarm(str(model), Path(folder), authority, admin)
        try:
            for span in blocks:
                await swarm.serve(span, **options)
            yield swarm
        finally:
            for peer in swarm.peers:
                await peer.stop()
            await swarm.admin.stop()
    for peer in swarm.peers:
        assert peer.engine.cache.free_pages == peer.engine.cache.n_pages, "pages leaked"
        assert peer.admission.sessions == 0, "a reservation leaked"
