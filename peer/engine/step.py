"""A step as the engine takes it and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.verification import TokenHistory, VerificationResult


class StepFailed(RuntimeError):
    """A step that could not run; the message says why, for the client."""


class BadStep(StepFailed):
    """The step itself is at fault: activations that are none, rows that are no longer there."""


class DeadlinePassed(StepFailed):
    """The step waited for compute until its deadline."""


@dataclass(frozen=True)
class StepInput:
    """A checked step: token ids at head and tail; encoded hidden states of the peer before, or a client's embeddings.

    `commit` names accepted rows of the step before; None where nothing is pending.
    """

    ids: Sequence[int]
    hidden: bytearray
    parents: Sequence[int]
    base: int
    commit: Sequence[int] | None
    rewind: int | None
    prefill: bool
    sample: bool
    sampling: SamplingParams | None = None
    history: TokenHistory | None = None
    top_logprobs: int = 0
    want_logits: bool = False
    want_hidden: bool = False
    deadline: float | None = None


@dataclass
class StepOutput:
    """What a step left behind: encoded hidden states for the next peer (or a client that wants them), a verdict at the
    tail; and when, in nanoseconds of the monotonic clock. `queued_ns`: how long it was ready while others computed."""

    hidden: bytes
    verdict: VerificationResult | None
    logits: bytes
    started_ns: int
    ended_ns: int
    queued_ns: int


Done = Callable[["StepOutput | StepFailed"], None]
