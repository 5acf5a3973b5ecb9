"""What a running peer says: to a person at a terminal, or to a program that reads JSON lines."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..protocol.trust.trust import member_name
from .progress import StartProgress

if TYPE_CHECKING:
    from .server import PeerServer


class Terminal:
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

    def progress(self) -> StartProgress:
        self._bar.start()
        task = self._bar.add_task("opening the checkpoint", total=None)

        def stage(text: str) -> None:
            self._bar.update(task, description=escape(text), completed=0, total=None)

        return StartProgress(
            stage,
            lambda done, total: self._bar.update(task, completed=done, total=total),
            lambda text: self._say(escape(text)),
        )

    def ready(self, server: PeerServer) -> None:
        self.stop()
        record = server.record()
        facts = (
            f"[b]{escape(record.model)}[/b]  blocks [b]{record.start}:{record.end}[/b] of {record.n_blocks} in "
            f"{record.dtype if record.quantization == 'none' else record.quantization}, "
            f"{record.throughput:.0f} tokens/s, cache of {record.cache_tokens} tokens"
        )
        member = member_name(record)
        whose = f"member {member}" if member else f"peer {record.peer_id}"
        with contextlib.suppress(OSError):
            self._console.print(
                Panel(
                    f"{facts}\n{whose}",
                    title=f"Petal peer ready at {escape(server.address)}",
                    expand=False,
                )
            )
        for line in ways_in(server.options.model, server.address, private=not record.multiaddrs):
            self._say(line)

    def leaving(self, sessions: int) -> None:
        moving = f" {sessions} sessions move elsewhere first; Ctrl-C again leaves at once." if sessions else ""
        self._say(f"Leaving the swarm.{moving}")

    def stop(self) -> None:
        """Take the progress bar away: what comes next is an error, or the end."""
        with contextlib.suppress(OSError):
            self._bar.stop()

    def failed(self, reason: str) -> None:
        """The reason is printed where the program ends."""
        self.stop()

    def _say(self, line: str) -> None:
        """One line however narrow the terminal is, so that it can be copied. A closed terminal hears nothing."""
        with contextlib.suppress(OSError):
            self._console.print(line, highlight=False, soft_wrap=True)


class JsonLines:
    """A program watches: one JSON object a line on standard output."""

    def set_up_logging(self) -> None:
        emit = self._emit

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                emit("log", level=record.levelname, logger=record.name, message=record.getMessage())

        logging.basicConfig(level=logging.WARNING, handlers=[Handler()])

    def progress(self) -> StartProgress:
        return StartProgress(
            lambda text: self._emit("stage", stage=text),
            lambda done, total: self._emit("loading", done=done, total=total),
            lambda text: self._emit("note", message=text),
        )

    def ready(self, server: PeerServer) -> None:
        record = server.record()
        self._emit(
            "ready",
            peer_id=record.peer_id,
            member=member_name(record) or None,
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

    def stop(self) -> None:
        """Nothing is left on the screen."""

    def failed(self, reason: str) -> None:
        self._emit("error", message=reason)

    def _emit(self, event: str, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the peer serves on
            print(json.dumps({"time": time.time(), "event": event, **fields}), flush=True)


def ways_in(model: str, address: str, private: bool) -> list[str]:
    """What others type, each a line to paste; a private swarm's members have their invitation."""
    if private:
        return ["Let others in, on an admin's machine:", "  [cyan]petal swarm invite[/cyan]"]
    name = escape(shlex.quote(model))
    where = f"--initial-peers {escape(address)}"
    return [
        "Add a peer:",
        f"  [cyan]petal-serve {name} {where}[/cyan]",
        "Generate:",
        f'  [cyan]petal generate {name} "Hi" {where}[/cyan]',
        "See all:",
        f"  [cyan]petal swarm status {where}[/cyan]",
    ]
