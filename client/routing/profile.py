"""Peers of one compute profile compute alike: in one dtype and quantization, in exact mode also by one arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ...protocol import petal_pb2 as pb


@dataclass(frozen=True)
class ComputeProfile:
    """How a peer computes; `numerics` counts in exact mode only."""

    dtype: str
    quantization: str
    numerics: str = ""

    @classmethod
    def of(cls, record: pb.PeerRecord, exact: bool = False) -> ComputeProfile:
        return cls(record.dtype, record.quantization, record.numerics if exact else "")

    def __str__(self) -> str:
        plain = self.quantization in ("", "none")
        return self.numerics or (self.dtype if plain else f"{self.quantization} ({self.dtype})")


def by_profile(records: Iterable[pb.PeerRecord], exact: bool = False) -> dict[ComputeProfile, list[pb.PeerRecord]]:
    groups: dict[ComputeProfile, list[pb.PeerRecord]] = defaultdict(list)
    for record in records:
        groups[ComputeProfile.of(record, exact)].append(record)
    return dict(groups)


def promises_exact(record: pb.PeerRecord) -> bool:
    return "exact" in record.features


def may_replace(one: pb.PeerRecord, other: pb.PeerRecord, block: int, *, exact: bool, mixed: bool) -> bool:
    """Whether `one` holds the same weights of a block and computes as `other` does; `mixed` allows another profile.

    Weights that are stored quantized differ in their bytes from those they were made of.
    """
    if exact and not promises_exact(one):
        return False
    if ComputeProfile.of(one, exact) != ComputeProfile.of(other, exact) and not mixed:
        return False
    if one.quantization != other.quantization:
        return True
    pairs = [(_block_digest(one, block), _block_digest(other, block))]
    if block == 0:
        pairs.append((one.embedding_digest, other.embedding_digest))
    if block == one.n_blocks - 1:
        pairs += [(one.norm_digest, other.norm_digest), (one.head_digest, other.head_digest)]
    return all(a == b for a, b in pairs)


def _block_digest(record: pb.PeerRecord, block: int) -> bytes:
    return record.block_digests[block - record.start] if record.block_digests else b""
