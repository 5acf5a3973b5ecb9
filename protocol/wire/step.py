"""The part of a step that every peer of a route sees, checked before anything uses it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .. import petal_pb2 as pb
from ..errors import PetalError
from .limits import MAX_ROWS, TOP_LOGPROBS
from .tree import DraftTree, RowTree, StepTree, TreeError, chain


class StepError(PetalError, ValueError):
    """A step that breaks the session protocol; the message says what is wrong and what is allowed."""


@dataclass(frozen=True)
class StepHeader:
    """Counters, commit and tree of one step. `commit` is empty after a prefill, whose rows are all accepted.

    `extent`: length of the sequence that the rows are part of, where it goes beyond them: some ropes depend on it.
    Made once, where a step enters a peer; a tree that came with token ids is a DraftTree.
    """

    step: int
    epoch: int
    base: int
    commit: tuple[int, ...]
    rewind: int | None
    tree: StepTree
    prefill: bool
    sample: bool
    top_logprobs: int
    want_logits: bool
    want_hidden: bool
    trace: bool
    deadline_ms: int
    replay: bool
    extent: int = 0

    @cached_property
    def rows(self) -> int:
        return len(self.tree.parents)

    @property
    def content(self) -> tuple[object, ...]:
        """Tells a repeated step from an altered one; route epoch, tracing and deadline may differ between repeats."""
        return (
            self.step,
            self.base,
            self.commit,
            self.rewind,
            self.tree.parents,
            self.prefill,
            self.sample,
            self.top_logprobs,
            self.want_logits,
            self.want_hidden,
            self.extent,
        )

    @property
    def length(self) -> int:
        """Of the sequence, as far as it is known here."""
        return max(self.extent, self.base + self.tree.height + 1)


def header_of(message: pb.Step | pb.Activations, rows: int, ids: tuple[int, ...] = ()) -> StepHeader:
    """Read and check a header; a message without parents carries a chain of `rows`. Raises StepError."""
    if not 0 < rows <= MAX_ROWS:
        raise StepError(f"a step of {rows} rows; from 1 to {MAX_ROWS} are allowed")
    parents = tuple(message.parents)
    if parents and len(parents) != rows:
        raise StepError(f"{rows} rows but {len(parents)} parents")
    tree: StepTree = chain(rows)
    try:
        if ids and not message.prefill:
            tree = DraftTree(ids, parents or tree.parents)
        elif parents:
            tree = RowTree(parents)
    except TreeError as error:
        raise StepError(str(error)) from error
    if message.prefill and not tree.is_chain:
        raise StepError("a prefill chunk is a chain, not a tree")
    if message.replay and (message.sample or not message.prefill or message.commit or message.HasField("rewind")):
        raise StepError("replayed rows are a prefill that samples, commits and rewinds nothing")
    if message.want.top_logprobs > TOP_LOGPROBS:
        raise StepError(f"top_logprobs is {message.want.top_logprobs}; at most {TOP_LOGPROBS} are returned")
    return StepHeader(
        step=message.step,
        epoch=message.route_epoch,
        base=message.base,
        commit=tuple(message.commit),
        rewind=message.rewind if message.HasField("rewind") else None,
        tree=tree,
        prefill=message.prefill,
        sample=message.sample,
        top_logprobs=message.want.top_logprobs,
        want_logits=message.want.logits,
        want_hidden=message.want.hidden,
        trace=message.trace,
        deadline_ms=message.deadline_ms,
        replay=message.replay,
        extent=message.extent,
    )


def put_header(header: StepHeader, message: pb.Activations) -> None:
    """Write the same header for the next peer: no token ids."""
    message.step, message.route_epoch = header.step, header.epoch
    message.base, message.rows, message.extent = header.base, header.rows, header.extent
    message.commit.extend(header.commit)
    if header.rewind is not None:
        message.rewind = header.rewind
    if not header.tree.is_chain:
        message.parents.extend(header.tree.parents)
    message.prefill, message.sample, message.trace = header.prefill, header.sample, header.trace
    message.deadline_ms = header.deadline_ms
    if header.top_logprobs or header.want_logits or header.want_hidden:
        want = pb.Want(top_logprobs=header.top_logprobs, logits=header.want_logits, hidden=header.want_hidden)
        message.want.CopyFrom(want)
