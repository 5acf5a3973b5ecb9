"""What the tail returns for a step, and what may be asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...protocol import petal_pb2 as pb
from ...protocol.wire.tree import DraftTree


@dataclass(frozen=True)
class Want:
    """What the tail returns beside tokens."""

    top_logprobs: int = 0
    logits: bool = False
    hidden: bool = False
    trace: bool = False


@dataclass
class StepResult:
    """The tail's answer: accepted rows (row 0 first) and the token behind the last of them.

    `logits` [rows, vocab] and `hidden` [rows, d], before the final norm, are of the rows sent, where they were wanted.
    """

    accepted: list[int] = field(default_factory=list)
    next_token: int | None = None
    logprobs: list[pb.RowLogprobs] = field(default_factory=list)
    hops: list[pb.Hop] = field(default_factory=list)
    logits: NDArray[np.float32] | None = None
    hidden: NDArray[np.float32] | None = None
    tree: DraftTree | None = None

    @property
    def path_ids(self) -> list[int]:
        """Tokens that the accepted path emitted before `next_token`."""
        return [self.tree.ids[row] for row in self.accepted[1:]] if self.tree else []
