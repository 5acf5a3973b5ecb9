"""Trusted ends: routes whose first and last blocks, which see tokens, run on peers of a given label only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..protocol import petal_pb2 as pb
from ..protocol.trust import Trust, TrustError
from .route import Route


@dataclass(frozen=True)
class TrustedEnds:
    """`labels` such as lab=oxford: peers need all of them. Labels are those that a private swarm's admins gave."""

    trust: Trust
    labels: frozenset[str] = frozenset()

    def of(self, record: pb.PeerRecord) -> frozenset[str]:
        """A peer's labels."""
        try:
            return frozenset(f"{label}={value}" for label, value in self.trust.labels_of(record.certificates).items())
        except TrustError:
            return frozenset()

    def limit(self, records: Iterable[pb.PeerRecord]) -> list[pb.PeerRecord]:
        """The records, those of other peers without their first and last block of the model."""
        limited = (record if self.labels <= self.of(record) else _inner(record) for record in records)
        return [record for record in limited if record.start < record.end]

    def __str__(self) -> str:
        return f"only peers labelled {' and '.join(sorted(self.labels))} may hold the first and the last block"


def explain(route: Route, ends: TrustedEnds, local_head: bool) -> list[dict[str, Any]]:
    """What each peer of a route sees."""
    stops = []
    for stop in route:
        head, tail = stop.blocks.start == 0, stop.blocks.stop == stop.peer.n_blocks
        seen = []
        if head:
            seen.append("embeddings of your tokens" if local_head else "your prompt as tokens")
        if tail:
            seen.append("last hidden states" if local_head else "your prompt and the answer as tokens")
        seen.append("activations" if not (head or tail) else "activations of its blocks")
        stops.append(
            {
                "peer_id": stop.peer.peer_id,
                "address": stop.peer.addresses[0],
                "blocks": [stop.blocks.start, stop.blocks.stop],
                "labels": sorted(ends.of(stop.peer)),
                "sees": seen,
            }
        )
    return stops


def table(stops: Iterable[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table("peer", "blocks", "labels", "sees")
    for stop in stops:
        start, end = stop["blocks"]
        shown.add_row(stop["peer_id"][-8:], f"{start}:{end}", " ".join(stop["labels"]) or "-", ", ".join(stop["sees"]))
    return shown


# What the table cannot say in a word.
CAVEAT = "Whoever has the model can recover text from activations and embeddings. All of them see your address."


def _inner(record: pb.PeerRecord) -> pb.PeerRecord:
    inner = pb.PeerRecord()
    inner.CopyFrom(record)
    inner.start, inner.end = max(record.start, 1), min(record.end, record.n_blocks - 1)
    if record.block_digests:
        inner.block_digests[:] = record.block_digests[inner.start - record.start : inner.end - record.start]
    return inner
