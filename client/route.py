"""Which peers a session runs through: pure functions over records and measured round trips."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..protocol import petal_pb2 as pb


class NoRoute(RuntimeError):
    """Some blocks have no peer; the message names them."""


@dataclass(frozen=True)
class Stop:
    """One peer of a route and the blocks that it applies."""

    peer: pb.PeerRecord
    blocks: range

    @property
    def name(self) -> str:
        return f"{self.peer.peer_id[-8:]} [{self.blocks.start}:{self.blocks.stop}]"


Route = tuple[Stop, ...]

# What a block costs on a peer that has not measured its speed, in seconds.
DEFAULT_BLOCK_S = 1e-3
DEFAULT_RTT_S = 0.05


def usable(record: pb.PeerRecord) -> bool:
    return record.state == pb.ONLINE and len(record.addresses) > 0


def missing_blocks(records: Iterable[pb.PeerRecord], n_blocks: int) -> list[range]:
    """Runs of blocks that no usable peer hosts."""
    hosted = {block for r in records if usable(r) for block in range(r.start, r.end)}
    runs: list[range] = []
    for block in range(n_blocks):
        if block in hosted:
            continue
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def describe_blocks(runs: Iterable[range]) -> str:
    """'blocks 0-9 and 20-29', as people number them."""
    names = [str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in runs]
    return ("block " if len(names) == 1 and "-" not in names[0] else "blocks ") + " and ".join(names)


def choose_route(records: Sequence[pb.PeerRecord], rtt_s: Mapping[str, float], reserve_tokens: int = 0) -> Route:
    """The cheapest path over block boundaries: each stop costs its round trip and its blocks' compute.

    `records` are peers of one model. Peers without room for `reserve_tokens` are a last resort: their answer may be
    newer than their record. No peer stops twice, because it holds one session once. Raises NoRoute.
    """
    n_blocks = max((r.n_blocks for r in records), default=0)
    online = [r for r in records if usable(r)]
    if not online or missing_blocks(online, n_blocks):
        gaps = describe_blocks(missing_blocks(online, n_blocks)) if n_blocks else "every block"
        raise NoRoute(f"nobody hosts {gaps}; start a peer with `petal-serve`, or wait for one")
    best: list[tuple[float, Route]] = [(0.0, ()), *[(float("inf"), ())] * n_blocks]
    for boundary in range(n_blocks):
        cost, route = best[boundary]
        for record in online:
            if not record.start <= boundary < record.end:
                continue
            for end in range(boundary + 1, record.end + 1):
                blocks = range(boundary, end)
                total = cost + _stop_cost(record, blocks, rtt_s, reserve_tokens)
                if total < best[end][0]:
                    best[end] = (total, (*route, Stop(record, blocks)))
    return _without_returns(best[n_blocks][1])


def _without_returns(route: Route) -> Route:
    """Let a peer that the path comes back to also apply what lies between; its span holds those blocks."""
    stops: list[Stop] = []
    for stop in route:
        names = [earlier.peer.peer_id for earlier in stops]
        if stop.peer.peer_id in names:
            first = names.index(stop.peer.peer_id)
            stop = Stop(stop.peer, range(stops[first].blocks.start, stop.blocks.stop))
            del stops[first:]
        stops.append(stop)
    return tuple(stops)


def _stop_cost(record: pb.PeerRecord, blocks: range, rtt_s: Mapping[str, float], reserve_tokens: int) -> float:
    span = record.end - record.start
    block_s = 1 / (record.throughput * span) if record.throughput > 0 else DEFAULT_BLOCK_S
    full = record.cache_tokens_free < reserve_tokens or record.sessions >= record.max_sessions
    return rtt_s.get(record.peer_id, DEFAULT_RTT_S) + block_s * len(blocks) + (1e3 if full else 0.0)


def context_of(route: Route) -> int:
    """Positions that every peer of the route can hold."""
    return min(stop.peer.context_length for stop in route)


def only_exact(records: Sequence[pb.PeerRecord]) -> list[pb.PeerRecord]:
    """Peers that promise exact mode by one arithmetic: the one that most of them share. Raises NoRoute."""
    exact = [record for record in records if "exact" in record.features]
    if not exact:
        raise NoRoute("no peer promises exact mode; start peers with `petal-serve --exact`")
    common, _ = Counter(record.numerics for record in exact).most_common(1)[0]
    return [record for record in exact if record.numerics == common]


def by_model(records: Iterable[pb.PeerRecord]) -> dict[bytes, list[pb.PeerRecord]]:
    """Records grouped by model digest: only peers of one digest make a route."""
    groups: dict[bytes, list[pb.PeerRecord]] = defaultdict(list)
    for record in records:
        groups[record.model_digest].append(record)
    return dict(groups)
