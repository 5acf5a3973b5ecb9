"""One choice as a row of blocks: some APIs open, fill and close each of them in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .events import CallArguments, CallBegin, Event, Finish, Reasoning, Text

Kind = Literal["text", "reasoning", "call"]


@dataclass
class Block:
    """`text` is a call's arguments where the block is one."""

    kind: Kind
    index: int
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class BlockStep:
    """What happened to a block; `more` brought `text`."""

    what: Literal["open", "more", "close"]
    block: Block
    text: str = ""


@dataclass
class Blocks:
    """At most the last block is open."""

    blocks: list[Block] = field(default_factory=list)
    _open: bool = False

    def add(self, event: Event) -> Iterator[BlockStep]:
        """What an event does to the blocks, in order."""
        if isinstance(event, CallBegin):
            yield from self._close()
            yield self._begin(Block("call", len(self.blocks), id=event.id, name=event.name))
        elif isinstance(event, CallArguments):
            yield self._more(event.text)
        elif isinstance(event, (Text, Reasoning)):
            kind: Kind = "text" if isinstance(event, Text) else "reasoning"
            if not self._open or self.blocks[-1].kind != kind:
                yield from self._close()
                yield self._begin(Block(kind, len(self.blocks)))
            yield self._more(event.text)
        elif isinstance(event, Finish):
            yield from self._close()

    def _begin(self, block: Block) -> BlockStep:
        self.blocks.append(block)
        self._open = True
        return BlockStep("open", block)

    def _more(self, text: str) -> BlockStep:
        self.blocks[-1].text += text
        return BlockStep("more", self.blocks[-1], text)

    def _close(self) -> Iterator[BlockStep]:
        if self._open:
            self._open = False
            yield BlockStep("close", self.blocks[-1])
