"""What a session's client, or the next peer, has still to read, and the answers that are in the making."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc

from ...protocol.wire.limits import UNREAD_BYTES
from ..limits.answers import Owed
from .spec import SessionFailed, SessionSpec
from .state import StepRecord


class Reader(Protocol):
    """Who reads a stream. `queued`: bytes that wait, `stalled_s`: seconds for which none of them was taken."""

    @property
    def queued(self) -> int: ...
    @property
    def stalled_s(self) -> float: ...


class Unread:
    """Counts them. `owes` is called where a session's answers need much room."""

    def __init__(self, spec: SessionSpec, readers: tuple[Reader, Reader], owes: Callable[[], None]) -> None:
        self._spec = spec
        self._readers = readers
        self._owes = owes
        self._promised: list[StepRecord] = []

    @property
    def owed(self) -> Owed:
        """Of all readers together."""
        self._promised = [record for record in self._promised if not record.finished]
        promised = sum(self._spec.answer_bytes(record.header) for record in self._promised)
        return Owed(promised + sum(r.queued for r in self._readers), max(r.stalled_s for r in self._readers))

    def promise(self, record: StepRecord) -> None:
        """An answer to this step, which asks for logits or hidden states, will be made."""
        self._promised.append(record)
        self._owes()

    def forget_promises(self) -> None:
        """Those steps were undone."""
        self._promised.clear()

    def too_much(self, queued: int) -> SessionFailed | None:
        """What nobody takes must not pile up, in one session nor in all of them: why this one ends."""
        self._owes()
        if queued > UNREAD_BYTES:
            return SessionFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{queued} bytes of answers wait to be read")
        return None
