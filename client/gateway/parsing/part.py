"""A piece of what a model said, and what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Part:
    """`call` begins a tool call, its text is the tool's name; `arguments` of the call that began last, in JSON."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str


class CallReader(Protocol):
    """Reads the inside of one block of calls, in whatever pieces it comes.

    `ended`: the block's last call is complete, by its own syntax. `rest` is what came behind that end.
    `quoted`: what comes next is the inside of a text, whatever it looks like.
    """

    ended: bool
    rest: str

    @property
    def quoted(self) -> bool: ...

    def feed(self, text: str) -> Iterator[Part]: ...

    def close(self) -> Iterator[Part]:
        """The block ends here, complete or not."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Without empty parts; neighbours of one kind become one, but for calls."""
    found: list[Part] = []
    for part in parts:
        if not part.text and part.kind != "call":
            continue
        if found and found[-1].kind == part.kind != "call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found
