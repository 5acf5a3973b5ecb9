"""Which peers a session runs through: pure functions over records and measured round trips."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

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

    @property
    def key(self) -> tuple[str, range]:
        """The same for every version of the peer's record."""
        return self.peer.peer_id, self.blocks


Route = tuple[Stop, ...]

# What a block costs on a peer that has not measured its speed, in seconds.
DEFAULT_BLOCK_S = 1e-3
DEFAULT_RTT_S = 0.05


def usable(record: pb.PeerRecord) -> bool:
    return record.state == pb.ONLINE and len(record.addresses) > 0


def missing_blocks(records: Iterable[pb.PeerRecord], n_blocks: int) -> list[range]:
    """Runs of blocks that no usable peer hosts."""
    hosted = {block for r in records if usable(r) for block in range(r.start, r.end)}
    return _runs(block for block in range(n_blocks) if block not in hosted)


def _runs(blocks: Iterable[int]) -> list[range]:
    """Rising numbers as runs of neighbours."""
    runs: list[range] = []
    for block in blocks:
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
    hosts = [Stop(r, range(r.start, r.end)) for r in online]
    return _cheapest(hosts, range(n_blocks), rtt_s, reserve_tokens)


def repair_route(
    route: Route,
    kept: Collection[Stop],
    records: Sequence[pb.PeerRecord],
    rtt_s: Mapping[str, float],
    reserve_tokens: int = 0,
    exact: bool = False,
) -> Route:
    """`route` with other peers, that compute alike, in place of the stops that are not kept; all new if need be.

    Raises NoRoute, naming the blocks that no such peer hosts.
    """
    hosts = [host for record in records if usable(record) and (host := _host_alike(record, route, exact))]
    keys = {stop.key for stop in kept}
    stops: list[Stop] = []
    for here, group in groupby(route, lambda stop: stop.key in keys):
        run = list(group)
        if not here:
            blocks = range(run[0].blocks.start, run[-1].blocks.stop)
            taken = {stop.peer.peer_id for stop in (*kept, *stops)}
            run = list(_cheapest([h for h in hosts if h.peer.peer_id not in taken], blocks, rtt_s, reserve_tokens))
        if not run:
            # Only a peer that is kept hosts what is missing: it takes more than it has now.
            stops = list(_cheapest(hosts, range(route[-1].blocks.stop), rtt_s, reserve_tokens))
            break
        stops += run
    if not stops:
        hosted = {block for host in hosts for block in host.blocks}
        gaps = _runs(block for block in range(route[-1].blocks.stop) if block not in hosted)
        raise NoRoute(f"nobody who can be reached hosts {describe_blocks(gaps)} any more")
    return tuple(stops)


def _host_alike(record: pb.PeerRecord, route: Route, exact: bool) -> Stop | None:
    """The peer with its longest run of blocks that it computes as the route's peers do."""
    stop_of = {block: stop for stop in route for block in stop.blocks}
    alike = (b for b in range(record.start, record.end) if _alike(record, stop_of[b].peer, b, exact))
    longest = max(_runs(alike), key=len, default=None)
    return Stop(record, longest) if longest else None


def _alike(one: pb.PeerRecord, other: pb.PeerRecord, block: int, exact: bool) -> bool:
    """Whether `one` holds the same weights of a block in the same format; in exact mode, for the same arithmetic."""
    if (one.dtype, one.quantization) != (other.dtype, other.quantization):
        return False
    pairs = [(_block_digest(one, block), _block_digest(other, block))]
    if block == 0:
        pairs.append((one.embedding_digest, other.embedding_digest))
    if block == one.n_blocks - 1:
        pairs += [(one.norm_digest, other.norm_digest), (one.head_digest, other.head_digest)]
    return all(a == b for a, b in pairs) and (not exact or ("exact" in one.features and one.numerics == other.numerics))


def _block_digest(record: pb.PeerRecord, block: int) -> bytes:
    return record.block_digests[block - record.start] if record.block_digests else b""


def _cheapest(hosts: Sequence[Stop], blocks: range, rtt_s: Mapping[str, float], reserve_tokens: int) -> Route:
    """The cheapest stops, each within a host's blocks, that apply all `blocks`; none where that is impossible."""
    best: dict[int, tuple[float, Route]] = {end: (float("inf"), ()) for end in range(blocks.start, blocks.stop + 1)}
    best[blocks.start] = (0.0, ())
    for boundary in blocks:
        cost, route = best[boundary]
        for host in hosts:
            if boundary not in host.blocks:
                continue
            for end in range(boundary + 1, min(host.blocks.stop, blocks.stop) + 1):
                total = cost + _stop_cost(host.peer, range(boundary, end), rtt_s, reserve_tokens)
                if total < best[end][0]:
                    best[end] = (total, (*route, Stop(host.peer, range(boundary, end))))
    return _without_returns(best[blocks.stop][1])


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
