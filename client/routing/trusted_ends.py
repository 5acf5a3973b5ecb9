"""Trusted ends: routes whose first and last blocks, which see tokens, run on peers of a given label only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...protocol import petal_pb2 as pb
from ...protocol.trust.trust import Trust, TrustError


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


def _inner(record: pb.PeerRecord) -> pb.PeerRecord:
    inner = pb.PeerRecord()
    inner.CopyFrom(record)
    inner.start, inner.end = max(record.start, 1), min(record.end, record.n_blocks - 1)
    if record.block_digests:
        inner.block_digests[:] = record.block_digests[inner.start - record.start : inner.end - record.start]
    return inner
