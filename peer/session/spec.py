"""What a session agreed on when it opened, and how one ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.wire.codec import row_bytes
from ...protocol.wire.limits import MAX_ROWS, WINDOW_BYTES
from ...protocol.wire.step import StepHeader


class SessionFailed(Exception):
    """Ends one session with a gRPC status and a sentence for its client."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def invalid(reason: str) -> SessionFailed:
    return SessionFailed(grpc.StatusCode.INVALID_ARGUMENT, reason)


@dataclass(frozen=True)
class SessionSpec:
    """What was agreed when the session opened."""

    session_id: bytes
    client_id: bytes
    codec: pb.Codec
    reserve_tokens: int
    context_length: int
    hidden_size: int
    vocab_size: int
    blocks: range
    n_blocks: int
    peer_id: str
    max_nodes: int = MAX_ROWS - 1

    @cached_property
    def is_first(self) -> bool:
        return self.blocks.start == 0

    @cached_property
    def is_last(self) -> bool:
        return self.blocks.stop == self.n_blocks

    @cached_property
    def row_bytes(self) -> int:
        return row_bytes(self.codec, self.hidden_size)

    def answer_bytes(self, header: StepHeader) -> int:
        """Of logits and hidden states that a step asks the last stage for."""
        logits = header.rows * self.vocab_size * 4 if header.want_logits else 0
        return (logits + header.rows * self.row_bytes if header.want_hidden else logits) if self.is_last else 0

    @cached_property
    def max_rows(self) -> int:
        """Half a window must hold a step, so that another can follow while its credit is on the way."""
        return min(MAX_ROWS, WINDOW_BYTES // 2 // self.row_bytes)
