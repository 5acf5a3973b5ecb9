"""The weights of a checkpoint on this machine, to know them by in a swarm that calls them otherwise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

from ...protocol import petal_pb2 as pb
from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.open import open_checkpoint
from .digests import weights_of


class OwnWeights:
    """Digests of what is stored at `source`; a model of a hub is not fetched for them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    async def same(self, records: list[pb.PeerRecord], pinned: Mapping[str, str]) -> list[pb.PeerRecord]:
        """The peers that provably hold these weights, all of theirs; by digests pinned before, else by the files."""
        if not records:
            return []
        return await asyncio.to_thread(lambda: [record for record in records if self._holds(record, pinned)])

    def _holds(self, record: pb.PeerRecord, pinned: Mapping[str, str]) -> bool:
        said = weights_of(record)
        if not all(said.values()):
            return False
        if not said.keys() <= {*pinned, *self._known}:
            self._read(record)
        return said.items() <= {**pinned, **self._known}.items()

    def _read(self, record: pb.PeerRecord) -> None:
        """Digest the parts that this peer hosts, named as `weights_of` names them."""
        if self.source != "demo" and not Path(self.source).exists():
            return
        prefix = record.model_digest.hex()
        with self._lock, open_checkpoint(self.source) as checkpoint:
            try:
                found = checkpoint.block_digests(record.start, min(record.end, checkpoint.n_blocks))
            except CheckpointError:
                return
        self._known |= {f"{prefix} {part}": digest for part, digest in found.items()}
