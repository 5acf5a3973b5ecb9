"""`petal-serve MODEL`: run one peer. What computes is imported once the command line is known to be good."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..protocol import program
from ..protocol.host import numeric
from . import arguments as a
from .limits.quotas import NO_QUOTAS, Quotas
from .options import ServeOptions

app = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings={"auto_envvar_prefix": a.PREFIX})


@app.command(epilog="Every option can be set in the environment, too:\n\nPETAL_SERVE_DHT_PORT is --dht-port.")
def serve(
    model: a.Model,
    blocks: a.Blocks = None,
    num_blocks: a.NumBlocks = None,
    initial_peers: a.InitialPeers = None,
    join: a.Join = None,
    host: a.Host = "0.0.0.0",
    port: a.Port = 0,
    announce: a.Announce = None,
    dht_port: a.DhtPort = 0,
    relay: a.Relay = False,
    identity: a.IdentityFile = None,
    device: a.Device = "auto",
    gpu_memory: a.GpuMemory = 0.9,
    dtype: a.Dtype = None,
    quant: a.Quant = None,
    cache_tokens: a.CacheTokens = None,
    max_sessions: a.MaxSessions = 64,
    threads: a.Threads = None,
    grace: a.Grace = 30.0,
    replay_mib: a.ReplayMib = 1024,
    quotas: a.QuotasFile = None,
    exact: a.Exact = False,
    json_logs: a.JsonLogs = False,
    version: Annotated[bool, typer.Option("--version", callback=program.show_version, is_eager=True)] = False,
) -> None:
    """Host a span of MODEL's blocks for a swarm. Without --initial-peers this starts a new swarm."""
    options = ServeOptions(
        model=model,
        blocks=a.parse_blocks(blocks) if blocks else None,
        num_blocks=num_blocks,
        host=numeric(host),
        port=port,
        announce=announce,
        dht_port=dht_port,
        relay=relay,
        initial_peers=tuple(initial_peers or ()),
        join=join,
        identity=identity,
        device=device,
        gpu_memory=gpu_memory,
        dtype=dtype,
        quant=quant,
        cache_tokens=cache_tokens,
        max_sessions=max_sessions,
        threads=threads,
        exact=exact,
        grace_s=grace,
        replay_bytes=replay_mib << 20,
        quotas=_quotas(quotas),
    )
    if problem := options.contradiction():
        raise typer.BadParameter(problem)
    try:
        from .lifecycle import run_peer
    except ImportError as error:
        raise RuntimeError(
            f"peers need more packages ({error.name} is missing): pip install 'petal-swarm[peer]'"
        ) from error
    raise typer.Exit(run_peer(options, json_logs))


def _quotas(path: Path | None) -> Quotas:
    try:
        return Quotas.read(path) if path else NO_QUOTAS
    except (OSError, ValueError) as error:
        raise typer.BadParameter(program.sentence(error), param_hint="--quotas") from error


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    program.run(app, "petal-serve", given, alone=arguments is None)
