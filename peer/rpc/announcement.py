"""What the swarm hears of this peer, and what this peer hears of the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from ...protocol import petal_pb2 as pb
from ...protocol.directory.directory import DirectoryError, DirectoryService
from ...protocol.directory.public import PublicDirectory
from ...protocol.directory.publisher import Publisher
from ...protocol.private.gossip import GossipDirectory
from ...protocol.trust.identity import Identity
from ...protocol.trust.trust import Trust
from ..limits.admission import Admission

log = logging.getLogger(__name__)

REFRESH_S = 2.0


class Announcement:
    """A peer's record, kept alive in its directory. `served` is what never changes of it."""

    def __init__(
        self,
        directory: PublicDirectory | GossipDirectory,
        identity: Identity,
        trust: Trust,
        served: pb.PeerRecord,
        admission: Admission,
    ) -> None:
        self.state: pb.PeerState = pb.JOINING
        # Once this peer is no member of its swarm any more.
        self.expelled = asyncio.Event()
        self.bootstrap: list[str] = []
        self._directory = directory
        self._identity = identity
        self._trust = trust
        self._served = served
        self._admission = admission
        self._publisher: Publisher | None = None
        self._background: list[asyncio.Task[None]] = []

    def record(self) -> pb.PeerRecord:
        """What the directory says of this peer, as of now."""
        record = pb.PeerRecord()
        record.CopyFrom(self._served)
        record.multiaddrs.extend(self.bootstrap[:8])
        record.state = self.state
        record.cache_tokens_free = self._admission.free_tokens
        record.sessions = self._admission.sessions
        record.certificates.extend(self._trust.certificates)
        record.hello_nonce = self._trust.nonce
        return record

    def service(self) -> DirectoryService:
        """The directory, for whoever asks this peer."""
        return DirectoryService(
            self._identity.peer_id,
            state=lambda: self.state,
            records=self._directory.book.signed,
            bootstrap=lambda: self.bootstrap,
            heard=self._directory.hear,
            revocations=lambda: self._trust.revocations,
        )

    async def prepare(self) -> None:
        """Hear of the others before anybody asks: who asks this peer for the directory shall not find it alone."""
        self.bootstrap = list(await self._directory.multiaddrs())
        with contextlib.suppress(DirectoryError):
            await self._directory.list()

    async def start(self, publish_s: float, heard: Callable[[], None]) -> None:
        """Go online: publish now and every `publish_s` seconds; `heard` is called whenever the directory was read."""
        self.state = pb.ONLINE
        self._publisher = Publisher(self._directory, self._identity, self.record, period_s=publish_s)
        await self._publisher.start()
        work = (self._refresh(heard), self._trust.keep(self._identity))
        self._background = [asyncio.create_task(part) for part in work]

    async def publish(self) -> None:
        """Tell at once, as after a change of state."""
        assert self._publisher
        try:
            await self._publisher.publish()
        except DirectoryError as error:
            log.warning("the directory does not hear of this peer: %s", error)

    async def stop(self) -> None:
        """Withdraw the record."""
        self.state = pb.DRAINING
        for task in self._background:
            task.cancel()
        if self._publisher:
            await self._publisher.stop()

    async def resolve(self, peer_id: str, fresh: bool) -> pb.PeerRecord | None:
        """Another peer's own signed record; where `fresh`, the directory is asked for it anew."""
        if fresh:
            with contextlib.suppress(DirectoryError):  # then the book is all there is
                await self._directory.list()
        records = self._directory.book.list()  # whatever it calls the weights that both hold
        return next((record for record in records if record.peer_id == peer_id), None)

    async def _refresh(self, heard: Callable[[], None]) -> None:
        """Keep the book that clients and links read fresh."""
        while True:
            try:
                await self._directory.list()
            except DirectoryError as error:
                log.warning("the directory is out of reach: %s", error)
            heard()
            if not self._trust.trusted(self._trust.certificates):
                self.expelled.set()
            await asyncio.sleep(REFRESH_S)
