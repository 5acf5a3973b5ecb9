"""A client's standing in a swarm: the peers of one model, and the sessions that it opens through them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from ..protocol import petal_pb2 as pb
from ..protocol.directory.directory import Directory
from ..protocol.trust.channels import Channels
from .event_loop import ModelClosed
from .load_once import LoadOnce
from .model_packages import import_beside_others
from .routing.grammar_peers import GrammarPeers, who_draw
from .routing.peers import ConnectError, KnownPeers
from .routing.route import NoRoute, Route, choose_route, context_of, sessions_that_fit
from .routing.trusted_ends import TrustedEnds
from .session.options import Grammar, SessionOptions
from .session.peer_error import PeerError, Refusals
from .session.session import Session

if TYPE_CHECKING:
    from .session.local_ends import LocalEnds

# Rows a draft tree may add behind prompt and answer.
TREE_ROOM = 128
# How soon a revoked peer's streams are cut once this client has heard of it.
SWEEP_S = 2.0


class SwarmConnection:
    """Routes and sessions through the peers that host `known`'s model, until closed.

    `defaults` holds for every session, but for its reservation. `local_source` is the checkpoint whose embedding and LM
    head run on this machine, or None where peers run them.
    """

    def __init__(
        self,
        known: KnownPeers,
        directory: Directory,
        ends: TrustedEnds,
        defaults: SessionOptions,
        local_source: str | None = None,
    ) -> None:
        self.known = known
        self.ends = ends
        self.channels = Channels(ends.trust)
        self._directory = directory
        self.defaults = defaults
        self._local_source = local_source
        self._local_ends: LoadOnce[LocalEnds] = LoadOnce()
        self._membership: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self, wait_s: float) -> None:
        """Wait up to `wait_s` seconds for a route, and keep what is known fresh from then on. Raises ConnectError."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                route = await self.route()
                break
            except NoRoute as error:
                if time.monotonic() >= deadline:
                    raise ConnectError(str(error)) from error
            await asyncio.sleep(0.5)
        await self._local_ends_for(route)
        self.known.keep_fresh()
        self._membership = asyncio.create_task(self._keep_trust())

    def __str__(self) -> str:
        if self._closed:
            return "closed"
        peers = self.known.reachable()
        return f"{max((peer.n_blocks for peer in peers), default=0)} blocks, {len(peers)} peers"

    async def close(self) -> None:
        """Leave the swarm; sessions end. Nothing where it was left already."""
        if self._closed:
            return
        self._closed = True
        if self._membership:
            self._membership.cancel()
        self.known.close()
        await self._directory.close()
        await self.channels.close()

    async def route(
        self, reserve_tokens: int = 0, without: Collection[str] = (), grammar: Grammar | None = None
    ) -> Route:
        """The route that a new session would take, past the peers `without`, to one that knows the grammar.

        Raises NoRoute, ConnectError, ModelClosed.
        """
        if self._closed:
            raise ModelClosed("the model is closed: connect again")
        await self.known.look()
        known, defaults = self.known, self.defaults
        try:
            usable = [record for record in known.usable() if record.peer_id not in without]
            usable = who_draw(usable, grammar.feature) if grammar else usable
            return choose_route(usable, known.rtt_s, reserve_tokens, exact=defaults.exact, mixed=defaults.mixed)
        except NoRoute as error:
            limits = filter(None, [str(self.ends) if self.ends.labels else "", known.left_out])
            raise NoRoute("; ".join([str(error), *limits])) from None

    @property
    def draws(self) -> bool:
        """Whether this machine draws, and no peer."""
        return self._local_source is not None

    async def sessions_that_fit(self, reserve_tokens: int) -> int:
        """How many sessions of so many tokens the peers have room for, as far as their records say; 0 where none is."""
        try:
            route = await self.route(reserve_tokens)
        except NoRoute:
            return 0
        return sessions_that_fit(self.known.reachable(), min(reserve_tokens, context_of(route) + TREE_ROOM))

    async def open_session(
        self,
        reserve_tokens: int,
        wait_s: float | None = None,
        spare_tokens: int = 0,
        grammar: Grammar | None = None,
    ) -> Session:
        """Open along the best route; where peers are busy or missing, try again with jitter, for `wait_s` seconds.

        Who refuses is passed by, until nobody else is there or another one says the same.

        Reserves no more than the model's context and room for a tree; up to `spare_tokens` more where the peers have
        them free and as many again. Raises PeerError, NoRoute.
        """
        deadline = time.monotonic() + (self.defaults.wait_s if wait_s is None else wait_s)
        refusals = Refusals()
        while True:
            try:
                session = await self._open(reserve_tokens, spare_tokens, refusals.peers, grammar)
            except PeerError as error:
                spare_tokens = 0  # others were quicker than the records
                passing = error.busy or error.gone
                if time.monotonic() > deadline or not (passing or (error.replaceable and not refusals.add(error))):
                    raise
                if error.gone:
                    self.known.ban(error.peer_id)
                await asyncio.sleep(random.uniform(0.1, 0.5) if error.busy else 0)
            except NoRoute:
                if refusals.first:
                    raise refusals.first from None
                if time.monotonic() > deadline:
                    raise
                await self.known.try_banned()
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                for liar in refusals.peers:
                    self.known.ban(liar)
                return session

    async def _open(
        self, reserve_tokens: int, spare_tokens: int, without: Collection[str], grammar: Grammar | None
    ) -> Session:
        route = await self.route(reserve_tokens, without, grammar)
        free = min(stop.peer.cache_tokens_free for stop in route) - reserve_tokens
        wanted = reserve_tokens + max(0, min(spare_tokens, free // 2))
        options = replace(
            self.defaults,
            reserve_tokens=min(wanted, context_of(route) + TREE_ROOM),
            local_ends=await self._local_ends_for(route),
            grammar=grammar,
        )
        finder = GrammarPeers(self.known, grammar.feature) if grammar else self.known
        session = Session(route, finder, self.channels, options)
        await session.open()
        self.known.pin(route)
        return session

    async def _local_ends_for(self, route: Route) -> LocalEnds | None:
        """Embedding and LM head as the route's last stage would have them. Raises ConnectError."""
        source, last = self._local_source, route[-1].peer
        if source is None:
            return None
        return await self._local_ends.get(last.dtype, lambda: load_local_ends(source, last, self.defaults.exact))

    async def _keep_trust(self) -> None:
        """Renew what this client shows; leave peers that are not trusted any more, and let sessions go on elsewhere."""
        renewing = asyncio.create_task(self.channels.trust.keep(None))
        try:
            while True:
                await asyncio.sleep(SWEEP_S)
                self.channels.sweep()
        finally:
            renewing.cancel()


def _local_ends() -> None:
    from .session import local_ends  # noqa: F401


def load_local_ends(source: str, last: pb.PeerRecord, exact: bool) -> LocalEnds:
    """See LocalEnds.load. Raises ConnectError, also where this machine has no torch."""
    try:
        import_beside_others(_local_ends)
        from .session.local_ends import LocalEnds, LocalEndsError
    except ImportError as error:
        raise ConnectError("local_ends needs torch and transformers: pip install 'petal-swarm[models]'") from error
    try:
        return LocalEnds.load(source, last, exact)
    except LocalEndsError as error:
        raise ConnectError(str(error)) from error
