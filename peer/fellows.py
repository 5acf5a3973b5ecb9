"""The other peers that hold a joiner's weights, and what they call them: digests decide, names are labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ..protocol import petal_pb2 as pb
from ..protocol.checkpoint.checkpoint import Checkpoint
from ..protocol.directory.directory import Directory
from ..protocol.directory.own_weights import OwnWeights


async def fellows(
    directory: Directory, peer_id: str, checkpoint: Checkpoint, source: str, note: Callable[[str], None]
) -> tuple[str, list[pb.PeerRecord]]:
    """The name to serve the weights at `source` under, and the records of their peers other than `peer_id`.

    Clients that know a name alone so find all peers of it. Raises DirectoryError.
    """
    digest, name = bytes.fromhex(checkpoint.digest()), checkpoint.name
    alike = [r for r in await directory.list() if r.model_digest == digest and r.peer_id != peer_id]
    found = await OwnWeights(source).fellows(alike, name)
    common = common_name(found, name)
    if common != name:
        note(f"the swarm calls these weights {common}, and so does this peer")
    if name in {record.model for record in alike} - {record.model for record in found}:
        note(f"the swarm serves other weights under the name {name}: their peers do not count here")
    return common, found


def common_name(records: Iterable[pb.PeerRecord], own: str) -> str:
    """What to call the weights that these peers hold, too: as one calls it `own`, else as most do."""
    names = Counter(record.model for record in records)
    return own if own in names or not names else max(sorted(names), key=lambda name: names[name])
