"""What `petal swarm status` shows: every record, pinged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...protocol import petal_pb2 as pb
from ...protocol.directory.digests import by_weights
from ...protocol.directory.directory import Directory, Pong, ping_all
from ...protocol.trust.trust import Trust, member_name
from ..routing.profile import ComputeProfile, by_profile
from ..routing.route import describe_blocks, missing_blocks

PING_S = 2.0
# Columns that the table needs with lines and bars.
WIDE = 150
# What people compare and type of a member's id; longer ones are understood, too.
SHORT = 12


async def swarm_status(directory: Directory, trust: Trust) -> dict[str, Any]:
    """Models, told apart by their weights, with coverage and peers.

    Peers that do not answer a ping count for nothing, but are shown.
    """
    records = await directory.list()
    pongs = await ping_all(records, trust, timeout=PING_S)
    models = [_model(group, pongs) for group in by_weights(records)]
    return {"models": sorted(models, key=lambda model: model["name"])}


def _model(records: list[pb.PeerRecord], pongs: dict[str, Pong | None]) -> dict[str, Any]:
    peers = [_peer(record, pongs.get(record.peer_id)) for record in records]
    reachable = [record for record, peer in zip(records, peers, strict=True) if peer["reachable"]]
    n_blocks = records[0].n_blocks
    profiles = [_coverage(profile, hosts, n_blocks) for profile, hosts in by_profile(reachable).items()]
    profiles.sort(key=lambda profile: -profile["covered"])
    first, *others = [name for name, _ in Counter(record.model for record in records).most_common()]
    return {
        "name": first,
        "other_names": others,
        "digest": records[0].model_digest.hex(),
        "n_blocks": n_blocks,
        # What one route can take: routes do not mix profiles.
        "covered": profiles[0]["covered"] if profiles else 0,
        "missing": profiles[0]["missing"] if profiles else [[0, n_blocks]],
        "profiles": profiles,
        "peers": sorted(peers, key=lambda peer: (peer["start"], peer["end"], peer["peer_id"])),
    }


def _coverage(profile: ComputeProfile, hosts: list[pb.PeerRecord], n_blocks: int) -> dict[str, Any]:
    missing = missing_blocks(hosts, n_blocks)
    return {
        "profile": str(profile),
        "dtype": profile.dtype,
        "quantization": profile.quantization,
        "covered": n_blocks - sum(map(len, missing)),
        "missing": [[run.start, run.stop] for run in missing],
    }


def _peer(record: pb.PeerRecord, pong: Pong | None) -> dict[str, Any]:
    reachable = pong is not None and pong.peer_id == record.peer_id
    return {
        "peer_id": record.peer_id,
        "member": member_name(record) or None,
        "start": record.start,
        "end": record.end,
        "address": record.addresses[0] if record.addresses else None,
        "state": pb.PeerState.Name(pong.state).lower() if pong and reachable else "unreachable",
        "reachable": reachable,
        "rtt_ms": round(pong.rtt_s * 1e3, 2) if pong and reachable else None,
        "dtype": record.dtype,
        "quantization": record.quantization,
        "cache_tokens": record.cache_tokens,
        "cache_tokens_free": record.cache_tokens_free,
        "sessions": record.sessions,
        "max_sessions": record.max_sessions,
        "tokens_per_s": round(record.throughput, 1),
    }


def print_status(report: dict[str, Any], console: Console) -> None:
    """A table a model; where there is room, with lines and a bar of its blocks."""
    if not report["models"]:
        console.print("The swarm answers, but nobody serves a model: start one with [cyan]petal-serve MODEL[/cyan].")
    for model in report["models"]:
        also = f"  also called {escape(', '.join(model['other_names']))}" if model["other_names"] else ""
        console.print(f"[b]{escape(model['name'])}[/b]  [dim]{model['digest'][:16]}[/dim]{also}", soft_wrap=True)
        if sum(other["digest"] == model["digest"] for other in report["models"]) > 1:
            console.print("[yellow]built as another model here is, with other weights[/yellow]", soft_wrap=True)
        console.print(_table(model, console.width))
        for line in _coverage_lines(model):
            console.print(line, highlight=False, soft_wrap=True)


def _coverage_lines(model: dict[str, Any]) -> Iterator[str]:
    if not model["missing"]:
        yield f"[green]all {model['n_blocks']} blocks are covered[/green]"
        return
    profiles = model["profiles"]
    for profile in profiles or [model]:
        gaps = describe_blocks(range(start, stop) for start, stop in profile["missing"])
        where = f" in {escape(profile['profile'])}" if len(profiles) > 1 else ""
        yield f"[red]{gaps} have no reachable peer{where}[/red]"
    mixed = " by one route, which keeps to one dtype and format unless --allow-mixed" if len(profiles) > 1 else ""
    yield f"Nobody can generate yet{mixed}: start a peer with [cyan]petal-serve {escape(model['name'])}[/cyan]."


# Columns, and the terminal's width from which on they are shown: the narrowest drop first what a person misses least.
_COLUMNS = {
    "peer": 0, "blocks": 0, "state": 0, "dtype": 100, "format": 70, "rtt ms": 80, "tokens/s": 70, "free": 80,
    "sessions": 90, "address": 0,
}  # fmt: skip


def _table(model: dict[str, Any], width: int) -> Table:
    wide = width >= WIDE
    table = Table(box=box.HEAVY_HEAD if wide else None, padding=(0, 1) if wide else (0, 1, 0, 0))
    shown = [name for name, least in _COLUMNS.items() if width >= least]
    for name in shown:
        right = name in ("rtt ms", "tokens/s", "free")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    if wide:
        table.add_column("")
    for peer in model["peers"]:
        cells = _cells(peer, wide)
        table.add_row(*(cells[name] for name in shown), *([_bar(peer, model["n_blocks"])] if wide else []))
    return table


def _cells(peer: dict[str, Any], wide: bool) -> dict[str, str]:
    colour = "green" if peer["state"] == "online" else "yellow" if peer["reachable"] else "red"
    return {
        "peer": peer["member"][:SHORT] if peer["member"] else peer["peer_id"][-8:],
        "blocks": f"{peer['start']}:{peer['end']}",
        "state": f"[{colour}]{peer['state']}[/{colour}]",
        "dtype": peer["dtype"],
        "format": peer["quantization"] if peer["quantization"] not in ("", "none") else peer["dtype"],
        "rtt ms": "-" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f}",
        "tokens/s": f"{peer['tokens_per_s']:.0f}",
        "free": f"{peer['cache_tokens_free']}/{peer['cache_tokens']}" if wide else f"{peer['cache_tokens_free']}",
        "sessions": f"{peer['sessions']}/{peer['max_sessions']}",
        "address": escape(peer["address"] or "-"),
    }


def _bar(peer: dict[str, Any], n_blocks: int, width: int = 30) -> str:
    scale = width / n_blocks
    start, end = round(peer["start"] * scale), max(round(peer["end"] * scale), round(peer["start"] * scale) + 1)
    return "[dim]" + "·" * start + "[/dim]" + "█" * (end - start) + "[dim]" + "·" * (width - end) + "[/dim]"
