"""Which span a joining peer takes: pure functions over the records of its model."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol import petal_pb2 as pb


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
