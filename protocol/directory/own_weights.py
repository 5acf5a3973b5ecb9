"""The weights of a checkpoint on this machine, to know them by in a swarm that calls them otherwise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from .. import petal_pb2 as pb
from ..checkpoint.layout import CheckpointError
from ..checkpoint.open import open_checkpoint
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

    async def fellows(self, records: Iterable[pb.PeerRecord], name: str) -> list[pb.PeerRecord]:
        """The peers of this model: those that provably hold these weights; where nothing can be compared, by `name`."""

        def is_fellow(record: pb.PeerRecord) -> bool:
            held = self._holds(record, {})
            return record.model == name if held is None else held

        return await asyncio.to_thread(lambda: [record for record in records if is_fellow(record)])

    def _holds(self, record: pb.PeerRecord, pinned: Mapping[str, str]) -> bool | None:
        """Whether the peer holds these weights; None where that cannot be told."""
        said = weights_of(record)
        if not all(said.values()):
            return None
        if not said.keys() <= {*pinned, *self._known}:
            self._read(record)
        known = {**pinned, **self._known}
        if any(known.get(part, digest) != digest for part, digest in said.items()):
            return False
        return True if said.keys() <= known.keys() else None

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
