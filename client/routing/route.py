"""Which peers a session runs through: pure functions over records and measured round trips."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from ...protocol import petal_pb2 as pb
from ...protocol.errors import PetalError
from .profile import ComputeProfile, by_profile, may_replace, promises_exact


class NoRoute(PetalError, RuntimeError):
    """Some blocks have no peer; the message names them."""


@dataclass(frozen=True)
class Stop:
    """One peer of a route and the blocks that it applies."""

    peer: pb.PeerRecord
    blocks: range

    def __repr__(self) -> str:
        return f"<Stop {self.name}>"

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


def is_full(record: pb.PeerRecord, reserve_tokens: int) -> bool:
    """Whether a session of so many tokens had no room when the peer published."""
    return record.cache_tokens_free < reserve_tokens or record.sessions >= record.max_sessions


def sessions_that_fit(records: Sequence[pb.PeerRecord], reserve_tokens: int) -> int:
    """Sessions of so many tokens that all blocks have room for, as far as the records say."""
    room: dict[int, int] = defaultdict(int)
    for record in filter(usable, records):
        tokens = record.cache_tokens_free // max(1, reserve_tokens)
        for block in range(record.start, record.end):
            room[block] += max(0, min(tokens, record.max_sessions - record.sessions))
    n_blocks = max((record.n_blocks for record in records), default=0)
    return min((room[block] for block in range(n_blocks)), default=0)


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


def choose_route(
    records: Sequence[pb.PeerRecord],
    rtt_s: Mapping[str, float],
    reserve_tokens: int = 0,
    *,
    exact: bool = False,
    mixed: bool = False,
) -> Route:
    """The cheapest path over block boundaries: each stop costs its round trip and its blocks' compute.

    `records` are peers of one model. Peers without room for `reserve_tokens` are a last resort: their answer may be
    newer than their record. No peer stops twice, because it holds one session once. All are of one profile; `mixed`
    mixes profiles where none has every block, `exact` leaves out those that do not promise exact mode. Raises NoRoute.
    """
    online = [r for r in records if usable(r) and (not exact or promises_exact(r))]
    if exact and records and not online:
        raise NoRoute("no peer promises exact mode; start peers with `petal-serve --exact`")
    n_blocks = max((r.n_blocks for r in records), default=0)
    if not online or missing_blocks(online, n_blocks):
        gaps = describe_blocks(missing_blocks(online, n_blocks)) if n_blocks else "every block"
        raise NoRoute(f"nobody hosts {gaps}; start a peer with `petal-serve`, or wait for one")

    def cheapest(hosts: Sequence[pb.PeerRecord]) -> Route:
        return _cheapest([Stop(r, range(r.start, r.end)) for r in hosts], range(n_blocks), rtt_s, reserve_tokens)

    profiles = by_profile(online, exact)
    routes = [route for hosts in profiles.values() if (route := cheapest(hosts))]
    if not routes and not mixed:
        raise NoRoute(_only_mixed(profiles, n_blocks))
    return min(
        routes or [cheapest(online)],
        key=lambda route: sum(_stop_cost(stop.peer, stop.blocks, rtt_s, reserve_tokens) for stop in route),
    )


def _only_mixed(profiles: Mapping[ComputeProfile, Sequence[pb.PeerRecord]], n_blocks: int) -> str:
    """Which blocks the profile that has most of them lacks, and what other profiles do about it."""
    gaps = {profile: missing_blocks(hosts, n_blocks) for profile, hosts in profiles.items()}
    best = min(gaps, key=lambda profile: sum(map(len, gaps[profile])))
    lacking = {block for run in gaps[best] for block in run}
    others = [
        str(profile)
        for profile, hosts in profiles.items()
        if profile != best and any(not lacking.isdisjoint(range(r.start, r.end)) for r in hosts)
    ]
    way_out = "exact mode keeps to one" if best.numerics else "--allow-mixed (allow_mixed=True) mixes both, not exactly"
    return f"{describe_blocks(gaps[best])} are served in {' or '.join(others)} only, the others in {best}; {way_out}"


def repair_route(
    route: Route,
    kept: Collection[Stop],
    records: Sequence[pb.PeerRecord],
    rtt_s: Mapping[str, float],
    reserve_tokens: int = 0,
    *,
    exact: bool = False,
    mixed: bool = False,
) -> Route:
    """`route` with other peers, that compute alike, in place of the stops that are not kept; all new if need be.

    `mixed` takes peers of another profile where none alike is there. Raises NoRoute, naming blocks that nobody hosts.
    """
    if mixed:
        with contextlib.suppress(NoRoute):
            return repair_route(route, kept, records, rtt_s, reserve_tokens, exact=exact)
    may_take_over = partial(may_replace, exact=exact, mixed=mixed)
    hosts = [host for record in records if usable(record) and (host := _host(record, route, may_take_over))]
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
        hosted = {block for host in (*hosts, *kept) for block in host.blocks}
        gaps = _runs(block for block in range(route[-1].blocks.stop) if block not in hosted)
        way_out = "" if exact or mixed else _other_profiles(records, route, gaps)
        raise NoRoute(f"nobody who can be reached hosts {describe_blocks(gaps)} any more{way_out}")
    return tuple(stops)


def _other_profiles(records: Iterable[pb.PeerRecord], route: Route, gaps: Iterable[range]) -> str:
    """What could fill the gaps if profiles were mixed."""
    profile_of = {block: ComputeProfile.of(stop.peer) for stop in route for block in stop.blocks}
    lacking = {block for run in gaps for block in run}
    others = {
        str(ComputeProfile.of(record))
        for record in records
        if usable(record)
        for block in lacking.intersection(range(record.start, record.end))
        if ComputeProfile.of(record) != profile_of[block]
    }
    return f" but in {' or '.join(sorted(others))}, which --allow-mixed would take" if others else ""


def _host(
    record: pb.PeerRecord, route: Route, fits: Callable[[pb.PeerRecord, pb.PeerRecord, int], bool]
) -> Stop | None:
    """The peer with its longest run of blocks where it fits in for the route's peers."""
    stop_of = {block: stop for stop in route for block in stop.blocks}
    fitting = (b for b in range(record.start, record.end) if fits(record, stop_of[b].peer, b))
    longest = max(_runs(fitting), key=len, default=None)
    return Stop(record, longest) if longest else None


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
    cost = rtt_s.get(record.peer_id, DEFAULT_RTT_S) + block_s * len(blocks)
    return cost + (1e3 if is_full(record, reserve_tokens) else 0.0)


def context_of(route: Route) -> int:
    """Positions that every peer of the route can hold."""
    return min(stop.peer.context_length for stop in route)


def same_profiles(route: Route, other: Route) -> bool:
    """Whether both compute every block alike."""
    profile_of = {block: ComputeProfile.of(stop.peer) for stop in route for block in stop.blocks}
    return all(profile_of[block] == ComputeProfile.of(stop.peer) for stop in other for block in stop.blocks)


def by_model(records: Iterable[pb.PeerRecord]) -> dict[bytes, list[pb.PeerRecord]]:
    """Records grouped by model digest: only peers of one digest make a route."""
    groups: dict[bytes, list[pb.PeerRecord]] = defaultdict(list)
    for record in records:
        groups[record.model_digest].append(record)
    return dict(groups)
