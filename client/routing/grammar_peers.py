"""Who may draw where a grammar counts: peers that mask alike, by one library and vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ...protocol import petal_pb2 as pb
from ...protocol.checkpoint.tokenizer import Tokenizer
from ...protocol.grammar.grammar import FEATURE, library_version
from .peers import KnownPeers
from .route import NoRoute


@dataclass(frozen=True)
class GrammarPeers:
    """Known peers, those that lack `feature` without the model's last block: nobody else draws, whoever fails."""

    known: KnownPeers
    feature: str

    @property
    def rtt_s(self) -> dict[str, float]:
        return self.known.rtt_s

    def reachable(self) -> list[pb.PeerRecord]:
        return who_draw(self.known.reachable(), self.feature)

    def ban(self, peer_id: str) -> None:
        self.known.ban(peer_id)

    async def look(self) -> object:
        return await self.known.look()

    async def try_banned(self) -> None:
        await self.known.try_banned()


def choose_feature(records: Iterable[pb.PeerRecord], tokenizer: Tokenizer) -> str:
    """By which library those who draw mask alike: this client's own where somebody has it. Raises NoRoute."""
    ending = f"/{tokenizer.vocab_digest}"
    offered = Counter(
        feature
        for record in records
        if record.end == record.n_blocks
        for feature in record.features
        if feature.startswith(f"{FEATURE}/") and feature.endswith(ending)
    )
    if not offered:
        raise NoRoute("nobody who hosts the last block serves grammars; start a peer that has llguidance installed")
    own = f"{FEATURE}/{library_version()}{ending}"
    return own if own in offered else offered.most_common(1)[0][0]


def who_draw(records: Iterable[pb.PeerRecord], feature: str) -> list[pb.PeerRecord]:
    """The records, those of peers that lack the feature without the model's last block."""
    limited = (record if feature in record.features else _without_last(record) for record in records)
    return [record for record in limited if record.start < record.end]


def _without_last(record: pb.PeerRecord) -> pb.PeerRecord:
    if record.end < record.n_blocks:
        return record
    inner = pb.PeerRecord()
    inner.CopyFrom(record)
    inner.end = record.n_blocks - 1
    if record.block_digests:
        inner.block_digests[:] = record.block_digests[: inner.end - record.start]
    return inner
