"""Three spans with some peers each, every peer behind an emulated link; faults, and what heals them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from petal.client.cli.status import swarm_status
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.directory.directory import GrpcDirectory
from petal.protocol.trust.trust import PublicTrust

from tests.support.emulator import Link
from tests.support.private_swarms import home
from tests.support.swarms import spans

from .cases import Model
from .peer_process import PeerProcess

SPANS = 3
DELAY_S = 0.001
SLOWER = 20
# Until peers that are well again are used again, and nothing is left of sessions that are gone.
HEALED_S = 30.0
# Until the swarm's status knows who is gone.
STATUS_S = 15.0


class ChaosSwarm:
    """Peers by number; number 0 is everybody's way into the DHT."""

    def __init__(self, model: Model, peers: list[PeerProcess], links: list[Link]) -> None:
        self.model = model
        self.peers = peers
        self.links = links
        self.clients: list[AsyncSwarmModel] = []

    def number_of(self, peer_id: str) -> int:
        return next(n for n, peer in enumerate(self.peers) if peer.peer_id == peer_id)

    # Faults, each with what it hits: numbers of peers.

    async def inject(self, fault: str, numbers: Sequence[int]) -> None:
        strike: dict[str, Callable[[int], Awaitable[None]]] = {
            "kill": self._kill,
            "two": self._kill,
            "bootstrap": self._kill,
            "restart": self._kill,
            "stop": self._stop,
            "drain": self._drain,
            "reset": self._reset,
            "cut": self._cut,
            "slow": self._slow,
        }
        await asyncio.gather(*(strike[fault](number) for number in numbers))

    async def _kill(self, number: int) -> None:
        self.peers[number].signal(signal.SIGKILL)

    async def _stop(self, number: int) -> None:
        self.peers[number].signal(signal.SIGSTOP)

    async def _drain(self, number: int) -> None:
        self.peers[number].signal(signal.SIGTERM)

    async def _reset(self, number: int) -> None:
        self.links[number].reset()

    async def _cut(self, number: int) -> None:
        self.links[number].cut()

    async def _slow(self, number: int) -> None:
        self.links[number].set(delay_s=DELAY_S * SLOWER)

    def relent(self, number: int) -> None:
        """What was only held up goes on."""
        if self.peers[number].alive:
            self.peers[number].signal(signal.SIGCONT)
        self.links[number].resume()
        self.links[number].set(delay_s=DELAY_S)

    async def restart(self, number: int) -> None:
        """The same identity, blocks and ports once more."""
        others = [peer.multiaddr for peer in self.peers if peer.alive and peer is not self.peers[number]]
        await self.peers[number].start(others)

    # Afterwards.

    async def heal(self, numbers: Sequence[int]) -> None:
        """Everything as before the fault. Raises TimeoutError where a client never uses a peer again."""
        for number in numbers:
            self.relent(number)
        await asyncio.gather(*(self.restart(n) for n, peer in enumerate(self.peers) if not peer.alive))
        wanted = {peer.peer_id for peer in self.peers}

        async def all_back(client: AsyncSwarmModel) -> bool:
            await client.connection.known.look()
            return {record.peer_id for record in client.connection.known.reachable()} == wanted

        for client in self.clients:
            await _until(lambda client=client: all_back(client), "a peer that is back is not used again")

    async def leaks(self, but: Sequence[int]) -> list[str]:
        """What survivors still hold of sessions that have ended."""
        found = []
        for number, peer in enumerate(self.peers):
            if number in but:
                continue

            async def empty(peer: PeerProcess = peer) -> bool:
                return (await peer.holdings()).nothing

            try:
                await _until(empty, "")
            except TimeoutError:
                found.append(f"peer {number} holds {await peer.holdings()}")
        return found

    async def inconsistencies(self, gone: Sequence[int]) -> list[str]:
        """Where the swarm's status, as a survivor tells it, does not say in time who is gone and who is there."""
        asked = next(peer for number, peer in enumerate(self.peers) if number not in gone)
        there = {peer.peer_id for number, peer in enumerate(self.peers) if number not in gone}
        told: set[str] = set()

        async def consistent() -> bool:
            nonlocal told
            trust = PublicTrust()
            report = await swarm_status(GrpcDirectory([asked.announced], trust=trust), trust)
            told = {peer["peer_id"] for model in report["models"] for peer in model["peers"] if peer["reachable"]}
            return told == there

        try:
            await _until(consistent, "", STATUS_S)
        except TimeoutError:
            return [
                f"status tells of {len(told - there)} peers that are gone, not of {len(there - told)} that are there"
            ]
        return []


async def _until(true: Callable[[], Awaitable[bool]], complaint: str, seconds: float = HEALED_S) -> None:
    deadline = time.monotonic() + seconds
    while not await true():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        await asyncio.sleep(0.1)


@asynccontextmanager
async def chaos_swarm(model: Model, hosts: int, clients: int, folder: Path) -> AsyncIterator[ChaosSwarm]:
    """Peers, `hosts` of each span, links and clients; afterwards no process is left."""
    blocks = spans(model.n_blocks, SPANS)
    peers = [PeerProcess(model.name, blocks[n % SPANS], folder, n) for n in range(SPANS * hosts)]
    async with AsyncExitStack() as stack:
        links = []
        for peer in peers:
            link = await stack.enter_async_context(
                Link(f"127.0.0.1:{peer.port}", delay_s=DELAY_S, lifetime_s=24 * 3600)
            )
            peer.announced = link.address
            links.append(link)
        try:
            await peers[0].start([])
            await asyncio.gather(*(peer.start([peers[0].multiaddr]) for peer in peers[1:]))
            swarm = ChaosSwarm(model, peers, links)
            for _ in range(clients):
                addresses = [peer.announced for peer in peers[:2]]
                with home(folder):
                    client = await AsyncSwarmModel.connect(model.name, addresses, exact=True, wait_s=30)
                stack.push_async_callback(client.close)
                swarm.clients.append(client)
            await swarm.heal([])
            yield swarm
        finally:
            for peer in peers:
                peer.destroy()
