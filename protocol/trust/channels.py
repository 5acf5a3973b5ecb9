"""The channels that one program holds to peers: one each, to the very key that the peer's record names."""

from __future__ import annotations

import asyncio

import grpc

from .. import petal_pb2 as pb
from .trust import Trust

# Streams of a channel that was replaced may go on for so long.
RETIRING_S = 3600.0


class Channels:
    """Made on demand, replaced where the peer's certificate or one's own is new, closed where the peer is revoked."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self._open: dict[str, tuple[tuple[bytes, ...], list[bytes], grpc.aio.Channel]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def to(self, record: pb.PeerRecord, address: str | None = None) -> grpc.aio.Channel:
        """The channel to a verified record's peer, at its best address unless another of its is given."""
        address = address or record.addresses[0]
        ends = (*record.certificates, *self.trust.certificates)
        if address in self._open and self._open[address][0] != ends:
            self._retire(address)
        if address not in self._open:
            self._open[address] = ends, list(record.certificates), self.trust.channel(record, address)
        return self._open[address][2]

    def sweep(self) -> None:
        """End every stream to peers that are not trusted any more."""
        for address, (_, certificates, _) in list(self._open.items()):
            if not self.trust.trusted(certificates):
                self._retire(address, grace_s=None)

    async def close(self) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*(channel.close() for _, _, channel in self._open.values()))
        self._open.clear()

    def _retire(self, address: str, grace_s: float | None = RETIRING_S) -> None:
        _, _, channel = self._open.pop(address)
        task = asyncio.ensure_future(channel.close(grace_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
