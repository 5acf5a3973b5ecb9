"""What the client and the peer before send of a step, checked on its own; the ledger checks it against the session."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol import petal_pb2 as pb
from ..protocol.sampling import SamplingError, SamplingParams
from ..protocol.step import StepError, StepHeader, header_of
from .frames import sampling_of
from .session_spec import SessionSpec, invalid
from .tail import TokenHistory


@dataclass
class ClientPart:
    """What the client sends of a step: ids for head and tail, sampling for the tail."""

    header: StepHeader
    ids: tuple[int, ...]
    sampling: SamplingParams | None
    history: TokenHistory | None

    @classmethod
    def of(cls, message: pb.Step, spec: SessionSpec) -> ClientPart:
        """Raises SessionFailed."""
        try:
            if message.op != pb.FORWARD:
                raise StepError("this peer runs forward steps only")
            if message.embeddings:
                raise StepError("this peer does not take embeddings yet; send token ids")
            header = header_of(message, len(message.ids))
            worst = max(message.ids)
            if worst >= spec.vocab_size:
                raise StepError(f"token id {worst} is past the vocabulary of {spec.vocab_size}")
            sampling = sampling_of(message.sampling) if message.HasField("sampling") else None
            history = _history(message, spec) if message.HasField("history") else None
        except (StepError, SamplingError) as error:
            raise invalid(str(error)) from error
        return cls(header, tuple(message.ids), sampling, history)


@dataclass
class LinkPart:
    """What the peer before sends of a step, in parts until it is whole."""

    header: StepHeader
    hidden: bytearray
    total: int
    hops: list[pb.Hop]
    ids: tuple[int, ...] = ()

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


def _history(message: pb.Step, spec: SessionSpec) -> TokenHistory:
    history = message.history
    if len(history.ids) != message.base or history.prompt_length > len(history.ids):
        raise StepError(f"a history of {len(history.ids)} ids does not fit {message.base} cached rows")
    if history.ids and max(history.ids) >= spec.vocab_size:
        raise StepError(f"the history holds an id past the vocabulary of {spec.vocab_size}")
    return TokenHistory(list(history.ids), history.prompt_length)
