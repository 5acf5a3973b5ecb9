"""How far a token travels through this code: `python -m tests.bench.token_way --json`.

Three peers and a client in one process decode one row a step, undrafted. Counted on all threads in frames of the
project's own files, for each token after the warm-up: Python calls (the resumption of a generator or a coroutine is
one), changes of file (from one call of a thread to its next), files entered, and those that the middle peer enters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import petal.peer

from ..support.swarms import local_swarm, spans
from .swarm import report

ROOT = Path(petal.peer.__path__[0]).resolve().parent
FOLDERS = tuple(f"{ROOT / name}/" for name in ("client", "kernels", "peer", "protocol"))
# What peers do all the time, whether there are tokens or not: whatever these call is no token's way.
HOUSEKEEPING = tuple(f"{ROOT / name}" for name in ("protocol/directory/", "peer/rpc/announcement.py"))
CLIENT, MIDDLE = -1, 1
WARM_UP = 8
PROMPT = list(range(20, 40))

# Whose code runs: a peer's number or the client. Tasks inherit it, and so does what they hand to other threads.
_whose: ContextVar[int] = ContextVar("whose", default=CLIENT)


@dataclass
class Token:
    """The calls of one token, by owner, file and function, and its changes of file."""

    calls: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    changes: int = 0


@dataclass
class Way:
    """The way of each token, as far as it was watched.

    Figures are medians, and files those that most tokens enter.
    """

    tokens: list[Token] = field(default_factory=list)
    on: bool = False
    # The peer of each compute thread.
    owners: dict[int, int] = field(default_factory=dict)
    _last: dict[int, str] = field(default_factory=dict)

    def files(self, owner: int | None = None) -> list[str]:
        """Files that code of this owner, or of any, enters."""
        entered = [{path for who, path, _ in token.calls if owner in (None, who)} for token in self.tokens]
        times = Counter(path for paths in entered for path in paths)
        return sorted(path for path, count in times.items() if 2 * count > len(self.tokens))

    def figures(self) -> dict[str, float]:
        return {
            "files": len(self.files()),
            "calls": median(token.calls.total() for token in self.tokens),
            "changes": median(token.changes for token in self.tokens),
            "middle_files": len(self.files(MIDDLE)),
        }

    def next(self, on: bool) -> None:
        """The token at hand is through."""
        self.on = on
        if on:
            self.tokens.append(Token())

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function."""
        code = frame.f_code
        if event != "call" or not self.on or not code.co_filename.startswith(FOLDERS):
            return
        if _keeps_house(frame):
            return
        thread, path = threading.get_ident(), code.co_filename[len(str(ROOT)) + 1 :]
        if thread in self.owners:
            _whose.set(self.owners[thread])
        token = self.tokens[-1]
        token.calls[_whose.get(), path, code.co_name] += 1
        token.changes += self._last.get(thread) != path
        self._last[thread] = path

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """This thread, and all that start meanwhile."""
        threading.setprofile(self.see)
        sys.setprofile(self.see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def _keeps_house(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith(HOUSEKEEPING):
            return True
        frame = frame.f_back
    return False


async def token_way(model: str | Path, n_blocks: int, tokens: int, prompt: list[int] = PROMPT) -> Way:
    """The way of `tokens` tokens behind the warm-up."""
    way = Way()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(way.watching())
        join = None
        for number, blocks in enumerate(spans(n_blocks, 3)):
            _whose.set(number)
            swarm = await stack.enter_async_context(local_swarm(model, [blocks], join))
            join = join or swarm.address
            way.owners[swarm.peers[0].engine.thread.ident or 0] = number
        _whose.set(CLIENT)
        client = await stack.enter_async_context(swarm.connect())
        emitted = 0
        async for piece in client.stream(prompt, max_new_tokens=WARM_UP + tokens, eos_token_id=-1, drafter="none"):
            emitted += len(piece.ids)
            way.next(WARM_UP <= emitted < WARM_UP + tokens)
    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--list", action="store_true", help="every function, by its calls a token")
    parser.add_argument("--owner", type=int, help="of this peer alone (0 to 2), or of the client (-1)")
    options = parser.parse_args()
    way = asyncio.run(token_way("demo", 30, options.tokens))
    rows: Counter[str] = Counter()
    for token in way.tokens:
        for (owner, path, function), count in token.calls.items():
            if owner == options.owner or options.owner is None:
                rows[f"{path}: {function}" if options.list else path] += count
    table = [(name, f"{count / options.tokens:.1f}") for name, count in rows.most_common()]
    report("A token's way through three peers", table, ("where", "calls a token"), way.figures())


if __name__ == "__main__":
    main()
