"""What the client and the peer before send of a step, checked on its own; the ledger checks it against the session."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ...protocol import petal_pb2 as pb
from ...protocol.wire.sampling import SamplingError, SamplingParams
from ...protocol.wire.step import StepError, StepHeader, header_of
from ...protocol.wire.verification import TokenHistory
from .frames import sampling_of
from .spec import SessionSpec, invalid
from .state import Rows


@dataclass
class ClientPart:
    """What the client sends of a step: ids for head and tail, sampling for the tail.

    A client that holds the LM head sends embeddings to the head peer, and to the tail nothing but the header.
    """

    header: StepHeader
    ids: tuple[int, ...]
    embeddings: bytes
    sampling: SamplingParams | None
    history: TokenHistory | None

    @property
    def rows(self) -> Rows:
        return hashlib.sha256(self.embeddings).digest() if self.embeddings else self.ids

    @classmethod
    def of(cls, message: pb.Step, spec: SessionSpec) -> ClientPart:
        """Raises SessionFailed."""
        try:
            if message.op != pb.FORWARD:
                raise StepError("this peer runs forward steps only")
            header = header_of(message, _count(message, spec))
            worst = max(message.ids, default=0)
            if worst >= spec.vocab_size:
                raise StepError(f"token id {worst} is past the vocabulary of {spec.vocab_size}")
            sampling = sampling_of(message.sampling) if message.HasField("sampling") else None
            history = _history(message, spec) if message.HasField("history") else None
        except (StepError, SamplingError) as error:
            raise invalid(str(error)) from error
        return cls(header, tuple(message.ids), message.embeddings, sampling, history)


@dataclass
class LinkPart:
    """What the peer before sends of a step, in parts until it is whole."""

    header: StepHeader
    hidden: bytearray
    total: int
    hops: list[pb.Hop]
    rows: Rows = ()

    @classmethod
    def of(cls, message: pb.Activations, spec: SessionSpec) -> LinkPart:
        """A part without activations yet. Raises SessionFailed."""
        try:
            header = header_of(message, message.rows)
        except StepError as error:
            raise invalid(str(error)) from error
        expected = header.rows * spec.row_bytes
        if message.total_bytes != expected:
            raise invalid(
                f"{header.rows} rows are {expected} bytes in this session's codec, {message.total_bytes} were announced"
            )
        return cls(header, bytearray(), expected, list(message.hops))

    @property
    def whole(self) -> bool:
        return len(self.hidden) == self.total

    def add(self, hidden: bytes) -> None:
        """Raises SessionFailed."""
        self.hidden += hidden
        if len(self.hidden) > self.total:
            raise invalid(f"step {self.header.step} brings {len(self.hidden)} bytes, {self.total} were announced")


def _count(message: pb.Step, spec: SessionSpec) -> int:
    """Rows of a step. Raises StepError."""
    if message.ids and message.embeddings:
        raise StepError("a step carries token ids or embeddings, not both")
    if message.embeddings and not spec.is_head:
        raise StepError("embeddings go to the head peer alone")
    if message.sample and spec.is_tail and not message.ids:
        raise StepError("the tail samples where it gets token ids; without them ask for hidden states")
    rows, rest = divmod(len(message.embeddings), spec.row_bytes)
    if rest:
        raise StepError(
            f"{len(message.embeddings)} bytes of embeddings are no rows of {spec.row_bytes} in this session's codec"
        )
    # Who gets neither learns the number of rows from their parents.
    return rows or len(message.ids) or (0 if spec.is_head else len(message.parents))


def _history(message: pb.Step, spec: SessionSpec) -> TokenHistory:
    history = message.history
    if len(history.ids) != message.base or history.prompt_length > len(history.ids):
        raise StepError(f"a history of {len(history.ids)} ids does not fit {message.base} cached rows")
    if history.ids and max(history.ids) >= spec.vocab_size:
        raise StepError(f"the history holds an id past the vocabulary of {spec.vocab_size}")
    return TokenHistory(list(history.ids), history.prompt_length)
