"""What `petal swarm status` shows: every record, pinged."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...protocol import petal_pb2 as pb
from ...protocol.directory.directory import Directory, Pong, ping_all
from ...protocol.trust.trust import Trust
from ..routing.route import by_model, describe_blocks, missing_blocks

PING_S = 2.0
# Columns that the table needs with lines and bars.
WIDE = 130


async def swarm_status(directory: Directory, trust: Trust) -> dict[str, Any]:
    """Models with coverage and peers. Peers that do not answer a ping count for nothing, but are shown."""
    records = await directory.list()
    pongs = await ping_all(records, trust, timeout=PING_S)
    models = [_model(group, pongs) for group in by_model(records).values()]
    return {"models": sorted(models, key=lambda model: model["name"])}


def _model(records: list[pb.PeerRecord], pongs: dict[str, Pong | None]) -> dict[str, Any]:
    peers = [_peer(record, pongs.get(record.peer_id)) for record in records]
    reachable = [record for record, peer in zip(records, peers, strict=True) if peer["reachable"]]
    n_blocks = records[0].n_blocks
    missing = missing_blocks(reachable, n_blocks)
    return {
        "name": records[0].model,
        "digest": records[0].model_digest.hex(),
        "n_blocks": n_blocks,
        "covered": n_blocks - sum(map(len, missing)),
        "missing": [[run.start, run.stop] for run in missing],
        "peers": sorted(peers, key=lambda peer: (peer["start"], peer["end"], peer["peer_id"])),
    }


def _peer(record: pb.PeerRecord, pong: Pong | None) -> dict[str, Any]:
    reachable = pong is not None and pong.peer_id == record.peer_id
    return {
        "peer_id": record.peer_id,
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
        console.print(f"[b]{escape(model['name'])}[/b]  [dim]{model['digest'][:16]}[/dim]", soft_wrap=True)
        console.print(_table(model, wide=console.width >= WIDE))
        if model["missing"]:
            gaps = describe_blocks(range(start, stop) for start, stop in model["missing"])
            console.print(f"[red]{gaps} have no reachable peer[/red]: nobody can generate yet.")
        else:
            console.print(f"[green]all {model['n_blocks']} blocks are covered[/green]")


def _table(model: dict[str, Any], wide: bool) -> Table:
    """Its narrow form fits the 80 columns of a plain terminal, or of a pipe, with no word cut."""
    table = Table(box=box.HEAVY_HEAD if wide else None, padding=(0, 1) if wide else (0, 1, 0, 0))
    for name in ("peer", "blocks", "state", "rtt ms", "tokens/s", "free", "sessions", "address"):
        right = name in ("rtt ms", "tokens/s", "free")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    if wide:
        table.add_column("")
    for peer in model["peers"]:
        colour = "green" if peer["state"] == "online" else "yellow" if peer["reachable"] else "red"
        cells = [
            peer["peer_id"][-8:],
            f"{peer['start']}:{peer['end']}",
            f"[{colour}]{peer['state']}[/{colour}]",
            "-" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f}",
            f"{peer['tokens_per_s']:.0f}",
            f"{peer['cache_tokens_free']}/{peer['cache_tokens']}" if wide else f"{peer['cache_tokens_free']}",
            f"{peer['sessions']}/{peer['max_sessions']}",
            escape(peer["address"] or "-"),
        ]
        table.add_row(*cells, *([_bar(peer, model["n_blocks"])] if wide else []))
    return table


def _bar(peer: dict[str, Any], n_blocks: int, width: int = 30) -> str:
    scale = width / n_blocks
    start, end = round(peer["start"] * scale), max(round(peer["end"] * scale), round(peer["start"] * scale) + 1)
    return "[dim]" + "·" * start + "[/dim]" + "█" * (end - start) + "[dim]" + "·" * (width - end) + "[/dim]"
