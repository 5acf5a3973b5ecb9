"""What the last stage returns for a step, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...protocol import petal_pb2 as pb
from ...protocol.wire.codec import CodecError, decode
from ...protocol.wire.tree import DraftTree

Array = NDArray[np.float32]


class ResultError(ValueError):
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


async def read_result(
    next_part: Callable[[], Awaitable[pb.Result]], asked: pb.Step, codec: pb.Codec, last: pb.PeerRecord
) -> StepResult:
    """The answer to `asked` from its parts. Raises ResultError for one that does not fit, PeerError as `next_part`."""
    result = StepResult()
    logits, hidden = bytearray(), bytearray()
    while True:
        part = await next_part()
        if part.step != asked.step:
            continue  # the answer to a repeat that was no longer needed
        if part.sampled:
            result.accepted, result.next_token = list(part.accepted), part.next_token
            result.logprobs = list(part.logprobs)
        result.hops.extend(part.hops)
        logits += part.logits
        hidden += part.hidden
        if part.last_part:
            break
    if logits:
        result.logits = np.frombuffer(bytes(logits), np.float32).reshape(-1, last.vocab_size)
    if hidden or asked.want.hidden:
        result.hidden = _hidden(bytes(hidden), asked, codec, last.hidden_size)
    return result


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
