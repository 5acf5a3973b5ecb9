"""What people see and type: answers as they come, conversations, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from ...protocol.directory.directory import DirectoryError
from ...protocol.wire.sampling import SamplingError
from ..output import OutputChunk
from ..routing.peers import ConnectError
from ..routing.route import NoRoute
from ..session.peer_error import PeerError
from .word_wrap import WordWrap

console = Console(stderr=True)

EXPECTED = (ConnectError, DirectoryError, NoRoute, PeerError, SamplingError, ValueError)


def peer_program() -> str | None:
    """Where `petal-serve` is: in this Python's environment, or on the path."""
    beside = os.path.join(os.path.dirname(sys.executable), "petal-serve")
    return beside if os.access(beside, os.X_OK) else shutil.which("petal-serve")


def show(chunks: Iterator[OutputChunk], verbose: bool = False) -> list[OutputChunk]:
    """Print the text as it comes; with `verbose` also which peers failed, and who took over."""
    shown = []
    wrap = WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    try:
        for chunk in chunks:
            shown.append(chunk)
            for event in chunk.events if verbose else ():
                console.print(f"\n[dim]{escape(str(event))}[/dim]", highlight=False, soft_wrap=True)
            print(wrap.add(chunk.text) if wrap else chunk.text, end="", flush=True)
    finally:
        print(wrap.flush() if wrap else "", flush=True)
    return shown


def cut_note(shown: list[OutputChunk]) -> str:
    """What to say of an answer that ended before it was over; nothing of one that was."""
    if not shown or shown[-1].finish_reason != "length":
        return ""
    return f"cut after {sum(len(chunk.ids) for chunk in shown)} tokens; --max-new-tokens allows more, up to the context"


def print_json(chunks: Iterator[OutputChunk]) -> None:
    """One object, also where the generation breaks off: then with the text so far and the reason."""
    collected: list[OutputChunk] = []
    broken: Exception | None = None
    try:
        for chunk in chunks:
            collected.append(chunk)
    except EXPECTED as error:
        broken = error
    answer = {
        "text": "".join(chunk.text for chunk in collected),
        "ids": [token for chunk in collected for token in chunk.ids],
        "finish_reason": collected[-1].finish_reason if collected else None,
        "seconds": sum(chunk.seconds for chunk in collected),
        "events": [str(event) for chunk in collected for event in chunk.events],
    }
    print(json.dumps(answer if broken is None else {**answer, "error": str(broken)}))
    if broken:
        raise broken
