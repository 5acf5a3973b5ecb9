"""The peers of one model as a client knows them: their records, how far they are, and who is out of reach."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Callable, Sequence

from ...protocol import petal_pb2 as pb
from ...protocol.directory.digests import agreeing, weights_of
from ...protocol.directory.directory import Directory, DirectoryError, ping_all
from ...protocol.directory.own_weights import OwnWeights
from ...protocol.errors import PetalError
from ...protocol.trust.trust import Trust
from .pins import Pins
from .route import NoRoute, Route, by_model, missing_blocks

REFRESH_S = 3.0
PING_S = 2.0


class ConnectError(PetalError, RuntimeError):
    """Why there is no such model to talk to, in one sentence that says what to do."""


class KnownPeers:
    """Records of the peers that host one model, within a limit. `rtt_s`: their measured round trips, by peer id.

    All hold the same weights, those that were used first; whoever says otherwise is left out.
    A peer that failed is left out until it answers a ping and has published a new record: a dead one can do neither.
    """

    def __init__(
        self,
        directory: Directory,
        trust: Trust,
        name: str,
        digest: bytes | None,
        limit: Callable[[list[pb.PeerRecord]], list[pb.PeerRecord]] = lambda records: records,
        own: OwnWeights | None = None,
    ) -> None:
        """`digest`: of the checkpoint that is known here, `own`; without one the name alone tells the model."""
        self.digest = digest
        self.rtt_s: dict[str, float] = {}
        self._directory = directory
        self._trust = trust
        self._limit = limit
        self._name = name
        self._own = own
        self._namesakes: list[pb.PeerRecord] = []
        self._pins = Pins(name)
        self._records: list[pb.PeerRecord] = []
        self._strange = 0
        self._banned: dict[str, int] = {}  # with the version of the record that it had
        self._refreshing: asyncio.Task[None] | None = None

    def keep_fresh(self) -> None:
        """Look again and again from now on, so that a route is at hand when a peer fails."""
        self._refreshing = asyncio.create_task(self._refresh())

    def close(self) -> None:
        if self._refreshing:
            self._refreshing.cancel()

    async def look(self) -> list[pb.PeerRecord]:
        """Ask the directory, and ping whom this client does not know yet or has banned. Raises ConnectError."""
        found = await self._found()
        agreed = agreeing(found, self._pins.digests)
        self._strange = len(found) - len(agreed)
        self._records = self._limit(agreed)
        back = [r for r in self._records if r.version > self._banned.get(r.peer_id, r.version)]
        await self._ping([r for r in self._records if r.peer_id not in self.rtt_s or r in back])
        return self._records

    async def _found(self) -> list[pb.PeerRecord]:
        """Records of the model by its name; where those lack blocks, by its weights under whatever name."""
        try:
            groups = by_model(await self._directory.list(self._name))
            if self.digest is None and groups:
                # Without a checkpoint of our own: the digest that was used first, or the one that most peers serve.
                self.digest = self._pins.model_digest or max(groups, key=lambda digest: len(groups[digest]))
            found = groups.get(self.digest or b"", [])
            there = [record for record in found if record.peer_id not in self._banned]
            if self._own and (not there or missing_blocks(there, there[0].n_blocks)):
                others = [r for r in await self._directory.list() if r.model_digest == self.digest]
                self._namesakes = [r for r in others if r.model != self._name]
                found = [*found, *await self._own.same(self._namesakes, self._pins.digests)]
        except DirectoryError as error:
            raise ConnectError(str(error)) from error
        if groups and not found:
            raise ConnectError(self._other_weights())
        return found

    def _other_weights(self) -> str:
        if self._own:
            return (
                f"the swarm serves other weights under the name {self._name} than {self._own.source} here: get theirs, "
                f"or serve these with `{self._serve}`"
            )
        return (
            f"the swarm serves other weights under the name {self._name} than this machine has used; where that is "
            f"right, accept them with `{self._forget}`"
        )

    @property
    def _serve(self) -> str:
        return f"petal-serve {shlex.quote(self._own.source if self._own else self._name)}"

    @property
    def _forget(self) -> str:
        return f"petal forget {shlex.quote(self._name)}"

    def pin(self, route: Route) -> None:
        """From now on, and in later runs, these are the model's weights."""
        for stop in route:
            self._pins.keep(stop.peer.model_digest, weights_of(stop.peer))

    @property
    def left_out(self) -> str:
        """Why there may be more peers than are used; empty where there are not."""
        if not self._strange:
            return ""
        return (
            f"{self._strange} of its peers hold other weights than were used here before, or than most others hold, "
            f"and are left out; where they are right, `{self._forget}` accepts them"
        )

    def _advice(self) -> str:
        """What to do where nobody serves the model."""
        names = sorted({record.model for record in self._namesakes})
        start = f"start one with `{self._serve}`"
        if not names:
            return start
        return (
            f"what is served as {' and '.join(names)} is built alike, but its weights differ or are not on this "
            f"machine to compare: give the path of that very file, or {start}"
        )

    def reachable(self) -> list[pb.PeerRecord]:
        """Peers that have not failed, as of the last look."""
        return [record for record in self._records if record.peer_id not in self._banned]

    def usable(self) -> list[pb.PeerRecord]:
        """Peers to route a new session through. Raises NoRoute where there is none."""
        if not self._records and self._strange:
            raise NoRoute(f"no peer serves the known weights of {self._name}")
        if not self._records:
            raise NoRoute(f"no peer serves {self._name}; {self._advice()}")
        reachable = self.reachable()
        if not reachable:
            raise NoRoute(f"none of the {len(self._records)} peers that serve {self._name} can be reached")
        return reachable

    def ban(self, peer_id: str) -> None:
        """Leave a peer out of routes."""
        versions = [record.version for record in self._records if record.peer_id == peer_id]
        self._banned[peer_id] = max(versions, default=0)

    async def try_banned(self) -> None:
        """Where nobody else is left: whoever answers a ping may be asked again at once."""
        await self._ping([record for record in self._records if record.peer_id in self._banned])

    async def _ping(self, records: Sequence[pb.PeerRecord]) -> None:
        peers = {record.peer_id: record for record in records}
        for peer_id, pong in (await ping_all(records, self._trust, timeout=PING_S)).items() if records else ():
            record = peers[peer_id]
            if pong is None or pong.peer_id != record.peer_id:
                self._banned[record.peer_id] = record.version
            else:
                self.rtt_s[record.peer_id] = pong.rtt_s
                self._banned.pop(record.peer_id, None)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            with contextlib.suppress(ConnectError):  # the peers known so far may still be there
                await self.look()
