"""Keeping a peer's record alive in the directory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from .. import petal_pb2 as pb
from ..trust.identity import Identity
from .directory import DirectoryError
from .records import sign_record

logger = logging.getLogger(__name__)
RETRY_S = 2.0


class Registry(Protocol):
    """Where records are published: a DhtDirectory."""

    async def publish(self, signed: pb.SignedRecord) -> None:
        """Replace the peer's record."""

    async def withdraw(self, identity: Identity, record: pb.PeerRecord) -> None:
        """Replace `record` by a tombstone."""


class Publisher:
    """Keeps a peer's record in the DHT alive: stamps, signs and publishes what `describe` says, again and again."""

    def __init__(
        self,
        registry: Registry,
        identity: Identity,
        describe: Callable[[], pb.PeerRecord],
        *,
        period_s: float = 10.0,
        lifetime_s: float = 30.0,
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._describe = describe
        self._period_s = period_s
        self._lifetime_s = lifetime_s
        self._last: pb.PeerRecord | None = None
        self._task: asyncio.Task[None] | None = None
        # Of two publications at once the DHT would refuse the one that was stamped first.
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Publish now and every period from now on; returns once the directory took the first record."""
        known = asyncio.Event()
        self._task = asyncio.create_task(self._run(known))
        await known.wait()

    async def publish(self) -> None:
        """Publish at once, as after a change of state."""
        async with self._turn:
            record = self._describe()
            now = time.time()
            record.version = max(int(now * 1000), self._last.version + 1 if self._last else 0)
            record.expires_at = now + self._lifetime_s
            self._last = record
            await self._registry.publish(sign_record(self._identity, record))

    async def stop(self) -> None:
        """Stop, and tell the DHT that the peer has left."""
        # A DHT at work may swallow a cancellation, and take it for an answer that did not come.
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=RETRY_S)
        if self._last is not None:
            try:
                await self._registry.withdraw(self._identity, self._last)
            except DirectoryError as error:
                logger.warning("Left without notice: %s", error)

    async def _run(self, known: asyncio.Event) -> None:
        heard, said = time.monotonic(), False
        while True:
            pause_s = self._period_s
            try:
                await self.publish()
                known.set()
                heard, said = time.monotonic(), False
            except Exception as error:  # the peer serves on, whatever ails its publication
                pause_s = min(RETRY_S, pause_s)
                # One try that failed costs nothing: the record before it lives on for a while.
                if not said and time.monotonic() - heard > self._lifetime_s / 2:
                    logger.warning("The swarm has not heard of this peer for %.0f s: %s", self._lifetime_s / 2, error)
                    said = True
            await asyncio.sleep(pause_s)
