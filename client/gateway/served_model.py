"""A model behind the door: a connection to its swarm as soon as there is one, and till then why there is none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.tokenizer import Tokenizer
from ...protocol.errors import PetalError
from ..generation import Generator
from ..routing.peers import ConnectError
from ..routing.route import NoRoute, Route, context_of
from ..swarm import AsyncSwarmModel
from .errors import unavailable
from .sessions import SessionPool
from .tasks import end

# How often a model without a route looks for one, and one with a route whether it is still there.
LOOK_S = 1.0
# Peers without an answer for so long have none.
ROUTE_S = 10.0


@dataclass
class ServedModel:
    """`alias` is the name under which the gateway was told of it, `connect` how to get to its swarm.

    `drafter` guesses ahead, see GenerationConfig: by default from the text alone, which costs no torch and no core.
    """

    alias: str
    connect: Callable[[], Awaitable[AsyncSwarmModel]]
    drafter: str = "ngram"
    started: float = field(default_factory=time.time)
    since: float = field(default_factory=time.time)
    # Why nobody can be served now, and from when on (unix seconds); empty where everybody can.
    lack: str = "the gateway is looking for peers"
    _model: AsyncSwarmModel | None = None
    _pool: SessionPool | None = None
    _route: Route = ()
    _watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then keep looking. Raises ConnectError where the model itself is at fault, not its peers."""
        await self._look()
        self._watch = asyncio.create_task(self._keep_looking())

    async def close(self) -> None:
        if self._watch:
            await end(self._watch)
        if self._pool:
            self._pool.close()
        if self._model:
            await self._model.close()

    @property
    def name(self) -> str:
        """As its peers know it."""
        return self._model.name if self._model else self.alias

    @property
    def context_length(self) -> int:
        """Positions of a session, as of the last look; 0 before there was a route."""
        return context_of(self._route) if self._route else 0

    @property
    def route(self) -> Route:
        """The peers that a session would have run through at the last look."""
        return self._route

    @property
    def generator(self) -> Generator:
        """Raises ApiError while there is no way to the model."""
        if self._model is None:
            raise self.why_not(self.lack)
        return self._model.generator

    @property
    def sessions(self) -> SessionPool:
        """Raises ApiError while there is no way to the model."""
        if self._pool is None:
            raise self.why_not(self.lack)
        return self._pool

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError while there is none."""
        generator = self.generator
        if generator.tokenizer is None:
            raise unavailable(f"{self.name} has no tokenizer: {generator.lack}")
        return generator.tokenizer

    def why_not(self, reason: str) -> PetalError:
        """What to tell who asks for this model: the reason, and for how long it has been so."""
        known = self.lack == reason
        since = time.strftime("%H:%M:%S", time.gmtime(self.since if known else time.time()))
        return unavailable(f"{self.name} cannot be served: {reason} (since {since} UTC)")

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(ConnectError):
                await self._look()

    async def _look(self) -> None:
        try:
            if self._model is None:
                self._model = await self.connect()
                self._pool = SessionPool(self._model.generator)
            self._route = await asyncio.wait_for(self._model.route(), ROUTE_S)
        except (NoRoute, ConnectError, asyncio.TimeoutError) as error:
            if isinstance(error.__cause__, CheckpointError):
                raise
            self._note(str(error) or "its peers do not answer")
        else:
            self._note("")

    def _note(self, lack: str) -> None:
        if lack != self.lack:
            self.lack, self.since = lack, time.time()
