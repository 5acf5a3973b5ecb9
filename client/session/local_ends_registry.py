"""The heads that a client holds of one model: one for each dtype that its routes compute in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...protocol import petal_pb2 as pb
from ..routing.peers import ConnectError
from ..routing.route import Route

if TYPE_CHECKING:
    from .local_ends import LocalHead


class HeadShelf:
    """Loads a head when the first route needs it."""

    def __init__(self, source: str, exact: bool) -> None:
        self._source, self._exact = source, exact
        self._loads: dict[str, asyncio.Task[LocalHead]] = {}

    async def head_for(self, route: Route) -> LocalHead:
        """The head as the route's tail would have it. Raises ConnectError."""
        tail = route[-1].peer
        if tail.dtype not in self._loads:
            self._loads[tail.dtype] = asyncio.ensure_future(asyncio.to_thread(self._load, tail))
        return await self._loads[tail.dtype]

    def _load(self, tail: pb.PeerRecord) -> LocalHead:
        try:
            from .local_ends import HeadError, LocalHead
        except ImportError as error:
            raise ConnectError("local_head needs torch and transformers: pip install 'petal-swarm[models]'") from error
        try:
            return LocalHead.load(self._source, tail, self._exact)
        except HeadError as error:
            raise ConnectError(str(error)) from error
