"""The compute thread's side of a session: its cache, what has been said so far, and its steps in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...protocol.grammar.grammar import GrammarMatcher, masked
from ...protocol.petal_pb2 import Codec
from ...protocol.wire.codec import CODEC_NAMES
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import chain
from ...protocol.wire.verification import Reshape, TokenHistory
from ..model import Span
from .fair_queue import Tenant
from .kv_cache import KVCache
from .page_table import BlockTable, CacheExhausted, RewindRefused
from .runner import Segment, joined
from .step import BadStep, Done, Step


@dataclass
class CachedSequence:
    """One session's rows on this peer. `step` is under way, the others wait; a broken one computes nothing more."""

    tenant: Tenant
    priority: int
    codec: Codec
    blocks: range
    span: Span
    cache: KVCache
    table: BlockTable
    grammar: GrammarMatcher | None = None
    history: TokenHistory = field(default_factory=TokenHistory)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pending_ids: Sequence[int] = ()
    step: Step | None = None
    waiting: deque[tuple[Step, Done]] = field(default_factory=deque)
    done: Done | None = None
    broken: bool = False

    @cached_property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return self.blocks.stop == self.span.n_blocks

    @property
    def reshape(self) -> Reshape | None:
        """What the grammar, if there is one, leaves of the scores."""
        return masked(self.grammar, self.history.prompt_length) if self.grammar else None

    def fork(self, parent: CachedSequence) -> None:
        """Start where another one is."""
        self.table = self.cache.fork(parent.table)
        self.history = parent.history.fork()
        self.sampling, self.pending_ids = parent.sampling, parent.pending_ids

    def begin(self) -> Step:
        """Take up the step that waits longest: apply what it says of the one before, then read its rows.

        Raises ActivationError, BadStep, CacheExhausted, RewindRefused.
        """
        step, self.done = self.waiting.popleft()
        self.step = step
        step.rows = self._rows(step)
        self._commit_and_rewind(step)
        self._remember(step)
        return step

    def segment(self, start: int, stop: int) -> Segment:
        """Rows [start, stop) of the step under way."""
        step = self._under_way()
        whole = stop - start == len(step.rows)
        tree, rows = (step.header.tree, step.rows) if whole else (chain(stop - start), step.rows[start:stop])
        return Segment(self.table, rows, tree, self.blocks, step.header.length)

    def collect(self, output: Tensor, started_ns: int, ended_ns: int, idle_ns: int) -> None:
        """Hidden states [n, d] of a chunk. idle_ns: when the iteration before had ended."""
        step = self._under_way()
        if not step.outputs:
            step.started_ns = started_ns
            step.queued_ns = max(0, min(idle_ns, started_ns) - step.submitted_ns)
        step.ended_ns = ended_ns
        step.outputs.append(output)
        if step.header.prefill:
            self.cache.commit(self.table, range(len(output)))

    def encoded(self) -> bytes:
        """Hidden states of the step that is through, for the next stage or a client that wants them; else nothing."""
        step = self._under_way()
        if self.is_last and not step.header.want_hidden:
            return b""
        return bytes(self.span.backend.encode(CODEC_NAMES[self.codec], joined(step.outputs)))

    def resume(self, length: int, commit: Sequence[int]) -> str:
        """Go back to `length` rows; see `Engine.resume`. Why that is impossible; empty where it is done."""
        self.step = self.done = None
        self.waiting.clear()
        table = self.table
        # Fewer rows: the pending ones are of the step that `commit` is about. Else they are of a step to undo.
        kept = commit if table.length < length else ()
        if table.length + len(kept) < length or list(kept) != sorted({*kept} & {*range(table.pending)}):
            return f"cannot resume at {length} rows: {table.length} are cached"
        try:
            self._commit(kept)
            self.cache.rewind(table, length)
        except (CacheExhausted, RewindRefused) as error:
            return str(error)
        self.history.truncate(length)
        self.pending_ids = ()
        return ""

    def _under_way(self) -> Step:
        assert self.step is not None
        return self.step

    def _rows(self, step: Step) -> Tensor:
        if self.blocks.start == 0 and step.ids:
            return torch.tensor(step.ids)
        return self.span.backend.decode(CODEC_NAMES[self.codec], step.hidden, self.span.hidden_size)

    def _commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the step before, drop the others."""
        self.cache.commit(self.table, rows)
        if self.pending_ids:
            self.history.ids.extend(self.pending_ids[row] for row in rows)

    def _commit_and_rewind(self, step: Step) -> None:
        header = step.header
        if self.table.pending:
            assert header.commit
            self._commit(header.commit)
        if header.rewind is not None:
            self.cache.rewind(self.table, header.rewind)
            self.history.truncate(header.rewind)
        assert self.table.length == header.base

    def _remember(self, step: Step) -> None:
        """What the last stage must know of the text, and how it draws."""
        header = step.header
        if step.history is not None:
            self.history = step.history
        known = len(self.history.ids)
        if header.sample and self.is_last and known != header.base:
            raise BadStep(f"{known} of {header.base} cached ids are known here; a last stage that samples needs all")
        if step.sampling is not None:
            self.sampling = step.sampling
        self.pending_ids = () if header.prefill else step.ids
        if header.prefill and self.is_last:
            self.history.ids.extend(step.ids)
            self.history.prompt_length = len(self.history.ids)
