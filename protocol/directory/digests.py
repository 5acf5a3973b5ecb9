"""Which weights peers hold, by the digests in their records: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .. import petal_pb2 as pb


def weights_of(record: pb.PeerRecord) -> dict[str, str]:
    """Digests in hex by part, of the stored bytes: whatever a peer quantizes as it loads, they are the same."""
    blocks = record.block_digests or [b""] * (record.end - record.start)
    parts = {str(record.start + place): digest for place, digest in enumerate(blocks)}
    if record.start == 0:
        parts["embedding"] = record.embedding_digest
    if record.end == record.n_blocks:
        parts |= {"norm": record.norm_digest, "head": record.head_digest}
    return {f"{record.model_digest.hex()} {part}": digest.hex() for part, digest in parts.items()}


def agreeing(records: Sequence[pb.PeerRecord], pinned: Mapping[str, str]) -> list[pb.PeerRecord]:
    """Those that hold the pinned weights and contradict none that more peers agree with."""
    weights = {record.peer_id: weights_of(record) for record in records}
    votes = Counter(item for parts in weights.values() for item in parts.items())

    def support(peer_id: str) -> tuple[float, str]:
        parts = weights[peer_id]
        return sum(votes[item] for item in parts.items()) / len(parts), peer_id

    expected, agreed = dict(pinned), set()
    for peer_id in sorted(weights, key=support, reverse=True):
        parts = weights[peer_id]
        if all(expected.get(part, digest) == digest for part, digest in parts.items()):
            expected |= parts
            agreed.add(peer_id)
    return [record for record in records if record.peer_id in agreed]


def by_weights(records: Iterable[pb.PeerRecord]) -> list[list[pb.PeerRecord]]:
    """Records grouped by the weights that they hold, the largest group first: names are labels.

    Whoever holds a part alike is of one group, and so is whoever shares a name, unless another part differs.
    """
    groups: list[list[pb.PeerRecord]] = []
    for record in sorted(records, key=lambda record: (record.start - record.end, record.peer_id)):
        together = [record]
        for group in list(groups):
            if _are_one(together, group):
                groups.remove(group)
                together = [*group, *together]
        groups.append(together)
    return sorted(groups, key=lambda group: -len(group))


def _are_one(records: Sequence[pb.PeerRecord], others: Sequence[pb.PeerRecord]) -> bool:
    mine, theirs = _known(records), _known(others)
    if any(theirs.get(part, digest) != digest for part, digest in mine.items()):
        return False
    if records[0].model_digest != others[0].model_digest:
        return False
    return bool(mine.keys() & theirs.keys() or {r.model for r in records} & {r.model for r in others})


def _known(records: Sequence[pb.PeerRecord]) -> dict[str, str]:
    return {part: digest for record in records for part, digest in weights_of(record).items() if digest}
