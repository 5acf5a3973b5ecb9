"""Where a session stands: which step comes next, how many rows are cached. Every refusal is a SessionFailed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import ANSWER_BYTES
from ...protocol.wire.step import StepHeader
from ...protocol.wire.tree import StepTree, TreeError
from ..engine.step import Step
from .spec import SessionFailed, SessionSpec, invalid

Frames = Sequence[pb.PeerFrame] | Sequence[pb.LinkFrame]


@dataclass
class StepRecord:
    """An accepted step: what a repeat must equal, and its answer once there is one."""

    header: StepHeader
    brought: tuple[int, ...] | bytes
    finished: bool = False
    answer: Frames = ()


class SequenceState:
    """What client and peer have agreed on. `missing`: rows of before that are still to be replayed."""

    def __init__(self, spec: SessionSpec) -> None:
        self.step = 0
        self.length = 0
        self.missing = 0
        self.newest: StepRecord | None = None
        self._spec = spec

    def check_room(self, rows: int) -> None:
        """The one limit of a session's rows, whichever way they come.

        The KV cache counts on it: who keeps to its reservation always finds a page.
        """
        reserved = self._spec.reserve_tokens
        if rows > reserved:
            raise SessionFailed(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{rows} rows exceed the {reserved} that this session reserved"
            )

    def adopt(self, parent: SequenceState) -> None:
        """Start as a fork of a session whose newest step must have finished."""
        if parent.missing or (parent.newest and not parent.newest.finished):
            raise not_between_steps()
        pending = parent.newest.header.rows if parent.newest and not parent.newest.header.prefill else 0
        self.check_room(parent.length + pending)
        self.step, self.length = parent.step, parent.length
        self.newest = parent.newest and StepRecord(parent.newest.header, parent.newest.brought, finished=True)

    def check_resume(self, message: pb.Resume) -> None:
        """Whether a session may stand where the client says."""
        if message.step > self.step:
            raise invalid(f"cannot resume behind step {message.step}: step {self.step} is the newest")
        self.check_room(message.length)

    def resume(self, step: int, length: int, missing: int) -> None:
        """Be as behind `step`, with `length` rows cached, the `missing` last of them yet to come."""
        self.step, self.length, self.missing, self.newest = step, length, missing, None

    def replay(self, header: StepHeader) -> None:
        """Take in replayed rows, which must be the next that are missing."""
        at = self.length - self.missing
        if header.step != self.step or header.base != at or header.rows > self.missing:
            raise invalid(
                f"a replay of rows {header.base} to {header.base + header.rows - 1} behind step {header.step}; "
                f"rows {at} to {self.length - 1} behind step {self.step} are missing"
                if self.missing
                else "a replay, but no row is missing"
            )
        self._check_header(header)
        self.missing -= header.rows

    def accept(self, step: Step) -> StepRecord | None:
        """Advance by a new step; None for a repeat of the newest."""
        header, newest = step.header, self.newest
        if newest and header.step == newest.header.step:
            if (header.content, step.brought) != (newest.header.content, newest.brought):
                raise invalid(f"step {header.step} was repeated with other content; a repeat must be the same")
            return None
        if header.step != self.step + 1:
            word = "stale" if header.step <= self.step else "ahead"
            raise invalid(f"step {header.step} is {word}; step {self.step + 1} comes next")
        if self.missing:
            raise invalid(f"step {header.step} came before the {self.missing} rows that are still to be replayed")
        length = self._committed(header)
        if header.base != length:
            raise invalid(f"base is {header.base}, but {length} rows are cached")
        self._check_header(header)
        self.step, self.length = header.step, length + header.rows if header.prefill else length
        self.newest = StepRecord(header, step.brought)
        return self.newest

    def _committed(self, header: StepHeader) -> int:
        """Rows cached before this step, after its commit and rewind."""
        length, newest = self.length, self.newest
        if newest and not newest.header.prefill:
            if not newest.finished:
                raise invalid("one tree is in flight a session; wait for its result")
            if header.commit != (0,):  # row 0 alone is a path in any tree
                _check_path(newest.header.tree, header.commit)
            length += len(header.commit)
        elif header.commit:
            raise invalid("the step before left nothing to commit")
        if header.rewind is not None:
            if header.rewind > length:
                raise invalid(f"cannot rewind to {header.rewind}: only {length} rows are cached")
            length = header.rewind
        return length

    def _check_header(self, header: StepHeader) -> None:
        spec = self._spec
        self.check_room(header.base + header.rows)
        if header.base + header.tree.height >= spec.context_length:
            raise invalid(f"the model's context ends at position {spec.context_length - 1}")
        if header.want_logits and header.rows * spec.vocab_size * 4 > ANSWER_BYTES:
            raise invalid(f"logits of {header.rows} rows exceed an answer of {ANSWER_BYTES} bytes; ask for fewer rows")
        if not header.prefill and header.rows - 1 > spec.max_nodes:
            raise invalid(f"a tree of {header.rows - 1} nodes; your quota here is {spec.max_nodes}")
        if header.rows > spec.max_rows:
            raise invalid(f"a step of {header.rows} rows; this peer takes up to {spec.max_rows}")


def _check_path(tree: StepTree, rows: Sequence[int]) -> None:
    try:
        tree.check_path(rows)
    except TreeError as error:
        raise invalid(f"bad commit: {error}") from error


def not_between_steps() -> SessionFailed:
    return SessionFailed(grpc.StatusCode.FAILED_PRECONDITION, "a session forks only between two steps")
