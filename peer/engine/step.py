"""A step as the engine takes it and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...protocol import petal_pb2 as pb
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.step import StepHeader
from ...protocol.wire.verification import TokenHistory, VerificationResult


class StepFailed(RuntimeError):
    """A step that could not run; the message says why, for the client."""

    @classmethod
    def by(cls, error: Exception) -> StepFailed:
        """Of an error of compute a client hears the first line."""
        return cls(f"compute failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}")


class BadStep(StepFailed):
    """The step itself is at fault: activations that are none, rows that are no longer there."""


class DeadlinePassed(StepFailed):
    """The step waited for compute until its deadline."""


_NO_ROWS = torch.empty(0)


@dataclass(eq=False)
class Step:
    """A checked step, made once where it enters a peer and carried to its answer.

    ids: at the first and the last stage. hidden: encoded activations of the stage before, or a client's embeddings.
    brought: what a client's repeat must bring again, its ids or a digest of its embeddings. deadline: in seconds of the
    monotonic clock. hops: of the stages before.
    """

    header: StepHeader
    ids: tuple[int, ...] = ()
    hidden: bytearray = field(default_factory=bytearray)
    brought: tuple[int, ...] | bytes = ()
    sampling: SamplingParams | None = None
    history: TokenHistory | None = None
    deadline: float | None = None
    hops: Sequence[pb.Hop] = ()
    # When, in nanoseconds of the monotonic clock; received: the last of its frames. queued_ns: how long it was ready
    # while others computed.
    received_ns: int = 0
    submitted_ns: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    queued_ns: int = 0
    # The compute thread's: token ids [n] or hidden states [n, d], and what came of the chunks that ran.
    rows: Tensor = _NO_ROWS
    outputs: list[Tensor] = field(default_factory=list)

    def hop(self, peer_id: str) -> pb.Hop:
        """When it was where on this peer."""
        return pb.Hop(
            peer_id=peer_id,
            received_ns=self.received_ns,
            start_ns=self.started_ns,
            end_ns=self.ended_ns,
            queue_ns=self.queued_ns,
        )


@dataclass
class StepOutput:
    """What a step left behind: encoded hidden states for the next peer, or for a client that wants them; at the last
    stage what its verification found, and logits where they were asked for."""

    hidden: bytes = b""
    verification: VerificationResult | None = None
    logits: bytes = b""


Done = Callable[[StepOutput | StepFailed], None]
