"""What the last stage returns for a step, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...protocol import petal_pb2 as pb
from ...protocol.errors import PetalError
from ...protocol.wire.codec import CodecError, decode
from ...protocol.wire.tree import DraftTree

Array = NDArray[np.float32]


class ResultError(PetalError, ValueError):
    """What is wrong with an answer."""


@dataclass(frozen=True)
class OutputOptions:
    """What the last stage returns beside tokens."""

    top_logprobs: int = 0
    logits: bool = False
    hidden: bool = False
    trace: bool = False


@dataclass
class StepResult:
    """The answer to a step: accepted rows (row 0 first) and the token behind the last of them.

    `logits` [rows, vocab] and `hidden` [rows, d], before the final norm, are of the rows sent, where they were wanted.
    """

    accepted: list[int] = field(default_factory=list)
    next_token: int | None = None
    logprobs: list[pb.RowLogprobs] = field(default_factory=list)
    hops: list[pb.Hop] = field(default_factory=list)
    logits: Array | None = None
    hidden: Array | None = None
    tree: DraftTree | None = None

    @property
    def path_ids(self) -> list[int]:
        """Tokens that the accepted path emitted before `next_token`."""
        return [self.tree.ids[row] for row in self.accepted[1:]] if self.tree else []

    @property
    def chosen_by(self) -> Array:
        """Logits of the rows behind which a token was emitted, [emitted, vocab]."""
        assert self.logits is not None
        return self.logits[self.accepted or [-1]]


class ResultReader:
    """Puts the answer to `asked` together from its parts; `last` is the record of the peer that sends them."""

    def __init__(self, asked: pb.Step, codec: pb.Codec, last: pb.PeerRecord) -> None:
        self._asked, self._codec, self._last = asked, codec, last
        self._result = StepResult()
        self._logits, self._hidden = bytearray(), bytearray()

    def add(self, part: pb.Result) -> StepResult | None:
        """Take a part; the answer where that was its last one. Raises ResultError for one that does not fit."""
        if part.step != self._asked.step:
            return None  # of the answer to a repeat that was no longer needed
        result = self._result
        if part.sampled:
            result.accepted, result.next_token = list(part.accepted), part.next_token
            result.logprobs = list(part.logprobs)
        result.hops.extend(part.hops)
        self._logits += part.logits
        self._hidden += part.hidden
        if not part.last_part:
            return None
        if self._logits:
            result.logits = _logits(bytes(self._logits), self._last.vocab_size)
        if self._hidden or self._asked.want.hidden:
            result.hidden = _hidden(bytes(self._hidden), self._asked, self._codec, self._last.hidden_size)
        return result


def _logits(data: bytes, vocab_size: int) -> Array:
    if len(data) % (4 * vocab_size):
        raise ResultError(f"sent logits that are none: {len(data)} bytes are no rows of {vocab_size} values")
    return np.frombuffer(data, np.float32).reshape(-1, vocab_size)


def _hidden(data: bytes, asked: pb.Step, codec: pb.Codec, width: int) -> Array:
    try:
        hidden = decode(codec, data, width) if data else np.empty((0, width), np.float32)
    except CodecError as error:
        raise ResultError(f"sent hidden states that are none: {error}") from error
    if asked.want.hidden and len(hidden) != len(asked.ids):
        raise ResultError(f"sent hidden states of {len(hidden)} rows, not {len(asked.ids)}")
    return hidden


def joined(results: Sequence[StepResult], output: OutputOptions) -> StepResult:
    """The last of a prompt's answers, with logits and hidden states of all of them."""
    last = results[-1]
    if output.logits:
        last.logits = np.concatenate([r.logits for r in results if r.logits is not None])
    if output.hidden:
        last.hidden = np.concatenate([r.hidden for r in results if r.hidden is not None])
    return last
