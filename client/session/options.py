"""What a session asks of its peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...protocol import petal_pb2 as pb

if TYPE_CHECKING:
    from .local_ends import LocalEnds


@dataclass(frozen=True)
class Grammar:
    """What the last stage lets a text say, and the feature of those that know it alike."""

    text: str
    feature: str


@dataclass(frozen=True)
class SessionOptions:
    """`wait_s`: for how long a session waits for blocks that nobody hosts any more.

    `mixed`: peers that take over may compute in another dtype or quantization. `local_ends`: where this machine embeds
    and draws, and peers get no token ids.
    """

    reserve_tokens: int
    codec: pb.Codec = pb.FLOAT32
    exact: bool = False
    mixed: bool = False
    priority: int = 0
    step_timeout_s: float = 120.0
    wait_s: float = 30.0
    local_ends: LocalEnds | None = None
    grammar: Grammar | None = None
