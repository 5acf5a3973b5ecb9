"""`petal-serve MODEL`: run one peer."""

from __future__ import annotations

import os

# Idle OpenMP threads spin, and three peers on one machine starve each other. Read when torch loads its OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# The DHT daemon is started by fork and exec, which needs nothing of gRPC; its handlers would only warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..protocol.checkpoint.layout import CheckpointError
from ..protocol.directory.directory import DirectoryError
from ..protocol.paths import data_dir
from ..protocol.private import ENVIRONMENT
from .limits.quotas import NO_QUOTAS, Quotas
from .options import DTYPES, QUANTS, ServeOptions

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


def _parse_blocks(text: str | None) -> range | None:
    if text is None:
        return None
    start, colon, end = text.partition(":")
    if not (colon and start.isdigit() and end.isdigit() and int(start) < int(end)):
        raise typer.BadParameter("give a half-open range such as 0:10")
    return range(int(start), int(end))


def _quotas(path: Path | None) -> Quotas:
    try:
        return Quotas.read(path) if path else NO_QUOTAS
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Hub id, local safetensors folder, GGUF file, or [b]demo[/b].")],
    blocks: Annotated[str | None, typer.Option(help="Host exactly this span, e.g. 0:10.")] = None,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="Host this many blocks, where they help most.")] = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(help="Join through these: libp2p multiaddrs or gRPC host:port.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(envvar=ENVIRONMENT, help="Of a private swarm: an invitation, or a file that holds it."),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="gRPC port; 0 picks one.")] = 0,
    announce: Annotated[str | None, typer.Option(help="host:port that others reach this peer at.")] = None,
    dht_port: Annotated[int, typer.Option(help="DHT port; 0 picks one.")] = 0,
    relay: Annotated[
        bool, typer.Option("--relay", help="Pass libp2p traffic of others on, and be reached through others that do.")
    ] = False,
    identity: Annotated[Path | None, typer.Option(help="Identity file, made if missing.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of dense weights: float32 (default), or bf16 for half the memory; unpacks quantized ones."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help=f"Of the blocks' weights: {', '.join(QUANTS)}; by default as stored, or as fits memory."),
    ] = None,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Size of the KV cache in tokens.")] = 16384,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads; all cores by default.")] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running sessions get to move elsewhere before this peer leaves.")
    ] = 30.0,
    replay_mib: Annotated[
        int, typer.Option(min=0, help="Memory for outputs that are sent again where another peer fails.")
    ] = 1024,
    quotas: Annotated[
        Path | None, typer.Option(help="JSON file: what clients may take, by role and label, and weights of labs.")
    ] = None,
    exact: Annotated[
        bool, typer.Option(help="Promise equal bits for a row in any batch, tree or chunk; refuse to start otherwise.")
    ] = False,
    json_logs: Annotated[bool, typer.Option("--json", help="Log events as JSON lines.")] = False,
) -> None:
    """Host a span of MODEL's blocks for a swarm. Without --initial-peers this starts a new swarm."""
    if device != "cpu" or dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"this version computes on cpu in {' or '.join(DTYPES)}, not on {device} in {dtype}")
    if quant not in (None, *QUANTS):
        raise typer.BadParameter(f"there is no weight format {quant!r}: choose one of {', '.join(QUANTS)}")
    options = ServeOptions(
        model=model,
        blocks=_parse_blocks(blocks),
        num_blocks=num_blocks,
        host=host,
        port=port,
        announce=announce,
        dht_port=dht_port,
        relay=relay,
        initial_peers=tuple(initial_peers or ()),
        join=join,
        identity=identity or data_dir() / "identity",
        device=device,
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
    ui = _JsonLines() if json_logs else _Terminal()
    ui.set_up_logging()
    # Imported late: --help and bad options answer at once.
    from .server import PeerServer, ServeError

    # The loop and the compute thread hand work to each other: neither should sit on the interpreter for long.
    sys.setswitchinterval(5e-4)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        leaving, hurrying = asyncio.Event(), asyncio.Event()

        def leave() -> None:
            (hurrying if leaving.is_set() else leaving).set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, leave)
        server = PeerServer(options, ui.progress())
        starting = asyncio.create_task(server.start())
        stopped = asyncio.create_task(leaving.wait())
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return
        starting.result()
        ui.ready(server)
        await stopped
        ui.leaving(len(server.service.sessions))
        draining = asyncio.create_task(server.drain(options.grace_s))
        hurry = asyncio.create_task(hurrying.wait())
        await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        await server.stop()

    try:
        uvloop.run(run())
    except (CheckpointError, DirectoryError, ServeError, OSError, ValueError) as error:
        ui.error(str(error))
        raise typer.Exit(1) from error


def _ways_in(model: str, multiaddr: str, address: str) -> list[str]:
    """What others type; a private swarm's members have their invitation."""
    if not multiaddr:
        return ["Private swarm: [cyan]petal swarm invite[/cyan], on an admin's machine, lets others in."]
    return [
        f"Add a peer:  [cyan]petal-serve {model} --initial-peers {multiaddr}[/cyan]",
        f'Generate:    [cyan]petal generate {model} "Hi" --initial-peers {address}[/cyan]',
        f"See all:     [cyan]petal swarm status --initial-peers {address}[/cyan]",
    ]


class _Terminal:
    """A person watches: progress bars, a banner, readable log lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def set_up_logging(self) -> None:
        logging.basicConfig(
            level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=self._console, show_path=False)]
        )

    def progress(self) -> Any:
        from .server import Progress as Hooks

        self._bar.start()
        task = self._bar.add_task("opening the checkpoint", total=None)

        def stage(text: str) -> None:
            self._bar.update(task, description=text)

        return Hooks(stage, lambda done, total: self._bar.update(task, completed=done, total=total))

    def ready(self, server: Any) -> None:
        self._bar.stop()
        record = server.record()
        join = next(iter(record.multiaddrs), "")
        lines = [
            f"[b]{record.model}[/b]  blocks [b]{record.start}:{record.end}[/b] of {record.n_blocks} in "
            f"{record.dtype if record.quantization == 'none' else record.quantization}, "
            f"{record.throughput:.0f} tokens/s, cache of {record.cache_tokens} tokens",
            f"peer {record.peer_id}",
            "",
            *_ways_in(server.options.model, join, server.address),
        ]
        self._console.print(Panel("\n".join(lines), title=f"Petal peer ready at {server.address}", expand=False))

    def leaving(self, sessions: int) -> None:
        moving = f" {sessions} sessions move elsewhere first; Ctrl-C again leaves at once." if sessions else ""
        self._console.print(f"Leaving the swarm.{moving}", highlight=False)

    def error(self, text: str) -> None:
        self._bar.stop()
        # What is in an error is never markup, and a line is a line however narrow the terminal is.
        self._console.print(f"[red]petal-serve:[/red] {escape(text)}", highlight=False, soft_wrap=True)


class _JsonLines:
    """A program watches: one JSON object a line on standard output."""

    def set_up_logging(self) -> None:
        emit = self._emit

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                emit("log", level=record.levelname, logger=record.name, message=record.getMessage())

        logging.basicConfig(level=logging.WARNING, handlers=[Handler()])

    def progress(self) -> Any:
        from .server import Progress as Hooks

        return Hooks(
            lambda text: self._emit("stage", stage=text),
            lambda done, total: self._emit("loading", done=done, total=total),
        )

    def ready(self, server: Any) -> None:
        record = server.record()
        self._emit(
            "ready",
            peer_id=record.peer_id,
            model=record.model,
            blocks=[record.start, record.end],
            address=server.address,
            port=server.port,
            multiaddrs=list(record.multiaddrs),
            dtype=record.dtype,
            quantization=record.quantization,
            tokens_per_s=record.throughput,
        )

    def leaving(self, sessions: int) -> None:
        self._emit("leaving", sessions=sessions)

    def error(self, text: str) -> None:
        self._emit("error", message=text)
        print(f"petal-serve: {text}", file=sys.stderr)

    def _emit(self, event: str, **fields: Any) -> None:
        print(json.dumps({"time": time.time(), "event": event, **fields}), flush=True)


def main() -> None:
    app()
