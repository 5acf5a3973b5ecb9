"""What a joining peer takes: pure functions over the records of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from ..protocol import petal_pb2 as pb

_Key = TypeVar("_Key", str, "Profile")


def block_supply(records: Iterable[pb.PeerRecord], n_blocks: int) -> list[float]:
    """Rows a second that the swarm can push through each block."""
    supply = [0.0] * n_blocks
    for record in records:
        if record.state in (pb.ONLINE, pb.JOINING):
            for block in range(record.start, min(record.end, n_blocks)):
                # A peer that has not measured itself yet still counts as somebody.
                supply[block] += record.throughput or 1.0
    return supply


def choose_span(records: Iterable[pb.PeerRecord], n_blocks: int, size: int) -> range:
    """The `size` blocks whose supply is weakest, so that the swarm's weakest point rises the most.

    Windows are compared by their sorted supplies, weakest block first (Petals, arXiv 2312.08361, section 3.2);
    the lowest start wins ties.
    """
    size = min(size, n_blocks)
    supply = block_supply(records, n_blocks)
    start = min(range(n_blocks - size + 1), key=lambda s: (sorted(supply[s : s + size]), s))
    return range(start, start + size)


class Profile(NamedTuple):
    """How a peer computes: routes do not mix profiles."""

    dtype: str
    quantization: str

    def __str__(self) -> str:
        return self.dtype if self.quantization in ("", "none") else f"{self.quantization} ({self.dtype})"


def of_profile(records: Iterable[pb.PeerRecord], profile: Profile) -> list[pb.PeerRecord]:
    return [record for record in records if (record.dtype, record.quantization) == profile]


def served_profiles(records: Iterable[pb.PeerRecord], n_blocks: int) -> list[Profile]:
    """The profiles that the swarm serves; the one that lacks fewest blocks first, of these the fastest."""
    return _fullest(records, n_blocks, lambda record: Profile(record.dtype, record.quantization))


def served_numerics(records: Iterable[pb.PeerRecord], n_blocks: int, profile: Profile) -> list[str]:
    """What peers of one profile that promise exact mode call their bits, in the same order."""
    exact = [record for record in of_profile(records, profile) if "exact" in record.features]
    return _fullest(exact, n_blocks, lambda record: record.numerics)


def _fullest(records: Iterable[pb.PeerRecord], n_blocks: int, key: Callable[[pb.PeerRecord], _Key]) -> list[_Key]:
    groups: dict[_Key, list[pb.PeerRecord]] = {}
    for record in records:
        if record.state in (pb.ONLINE, pb.JOINING):
            groups.setdefault(key(record), []).append(record)

    def rank(group: _Key) -> tuple[int, float, _Key]:
        supply = block_supply(groups[group], n_blocks)
        return supply.count(0.0), -sum(supply), group

    return sorted(groups, key=rank)


def fill_gaps(records: Iterable[pb.PeerRecord], n_blocks: int, most: int) -> tuple[range, str]:
    """The span of a joiner that may take up to `most` blocks, and why: what nobody serves, and no more, comes first."""
    records = list(records)
    window = choose_span(records, n_blocks, most)
    supply = block_supply(records, n_blocks)
    lacking = [block for block in window if not supply[block]]
    if not any(supply):
        return window, "nobody serves any yet"
    if lacking:
        return range(lacking[0], lacking[-1] + 1), "nobody serves them yet"
    return window, "all are served, these by the slowest" if len(window) < n_blocks else "all are served; a spare helps"
