"""The compute thread: commands in, ragged iterations, results out. It never waits on the network.

The event loop posts commands and never blocks; results are handed back through callbacks that must not block either.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...protocol.petal_pb2 import Codec
from ...protocol.wire.codec import CodecError, encode
from ...protocol.wire.sampling import SamplingError, SamplingParams
from ...protocol.wire.tree import DraftTree, chain, depths
from ...protocol.wire.verification import TokenHistory, VerificationResult, draw_after_prefill, verify
from ..model import Span
from .batching_window import BatchingWindow
from .decode import decode_rows
from .fair_queue import Tenant
from .kv_cache import KVPool, PoolExhausted, RewindRefused, SessionCache
from .runner import Executor, Segment
from .scheduler import Budget, Chunk, Ready, Scheduler
from .step import BadStep, DeadlinePassed, Done, StepFailed, StepInput, StepOutput

log = logging.getLogger(__name__)

# Quiet for so long, the compute thread checks its own bookkeeping.
IDLE_S = 1.0
# Commands between two iterations, at most: a flood of them must not keep ready steps waiting.
MOST_COMMANDS = 256


@dataclass
class _Job:
    """A step on its way through the scheduler; a prefill collects the hidden states of its chunks."""

    step: StepInput
    done: Done
    submitted_ns: int
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    started_ns: int = 0
    ended_ns: int = 0
    queued_ns: int = 0
    hidden: list[Tensor] = field(default_factory=list)


@dataclass
class _Session:
    """The compute thread's side of a session."""

    tenant: Tenant
    priority: int
    codec: Codec
    blocks: range
    cache: SessionCache
    history: TokenHistory = field(default_factory=TokenHistory)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pending_ids: Sequence[int] = ()
    job: _Job | None = None
    waiting: deque[_Job] = field(default_factory=deque)
    broken: bool = False


class Engine:
    """Owns the pool and every session's cache; runs on one thread of its own."""

    def __init__(self, span: Span, pool: KVPool, budget: Budget | None = None) -> None:
        self.span = span
        self.pool = pool
        self._executor = Executor(span, pool)
        self._scheduler: Scheduler[bytes] = Scheduler(budget or Budget())
        self._sessions: dict[bytes, _Session] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._batching = BatchingWindow()
        self._iteration_end_ns = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # Called from the event loop.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the iteration at hand and end the thread."""
        self._post(None)
        self._thread.join()

    def open(
        self,
        session: bytes,
        tenant: Tenant,
        codec: Codec,
        blocks: range,
        priority: int = 0,
        fork_of: bytes | None = None,
    ) -> None:
        self._post(lambda: self._open(session, _Session(tenant, priority, codec, blocks, self.pool.open()), fork_of))

    def submit(self, session: bytes, step: StepInput, done: Done) -> None:
        """Queue a step behind the session's others; `done` is called on the compute thread."""
        job = _Job(step, done, time.monotonic_ns())
        self._post(lambda: self._queue(session, job))

    def resume(self, session: bytes, length: int, commit: Sequence[int], done: Callable[[str], None]) -> None:
        """Undo what the session does and go back to `length` rows, `commit` naming those that are not committed yet.

        `done` gets the reason where that is impossible; no `done` of an undone step is called after it.
        """
        self._post(lambda: done(self._resume(session, length, commit)))

    def close(self, session: bytes) -> None:
        """Forget a session at once, whatever it was doing; its pages are free before the next iteration."""
        self._post(lambda: self._close(session))

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the compute thread, between two iterations."""
        self._post(function)

    def check(self) -> None:
        """Integrity of pool and sessions; on the compute thread."""
        self.pool.check(session.cache for session in self._sessions.values())

    def _post(self, command: Callable[[], None] | None) -> None:
        self._commands.put(command)

    # On the compute thread.

    def _run(self) -> None:
        checked = False
        commands = 0
        while True:
            busy = len(self._scheduler) > 0
            wait: float | None
            if busy and commands >= MOST_COMMANDS:
                self._iterate()
                commands = 0
                continue
            if busy:
                wait = self._batching.wait(time.monotonic(), self._scheduler.decodes)
            else:
                wait = None if checked else IDLE_S
            try:
                command = self._commands.get(wait != 0, timeout=wait)
            except Empty:
                if busy:
                    self._iterate()
                    checked = False
                    commands = 0
                else:
                    self.check()
                    checked = True
                continue
            if command is None:
                return
            command()
            commands += 1

    def _open(self, session: bytes, opened: _Session, fork_of: bytes | None) -> None:
        assert session not in self._sessions
        if parent := self._sessions.get(fork_of or b""):
            opened.cache = self.pool.fork(parent.cache)
            opened.history = parent.history.fork()
            opened.sampling, opened.pending_ids = parent.sampling, parent.pending_ids
        self._sessions[session] = opened

    def _close(self, session: bytes) -> None:
        self._scheduler.cancel(session)
        if gone := self._sessions.pop(session, None):
            self.pool.release(gone.cache)

    def _queue(self, key: bytes, job: _Job) -> None:
        session = self._sessions.get(key)
        if session is None or session.broken:
            return  # closed or failed while the step was on its way
        session.waiting.append(job)
        if session.job is None:
            self._begin(key, session)

    def _begin(self, key: bytes, session: _Session) -> None:
        """Make the session's next step ready for the scheduler."""
        job = session.waiting.popleft()
        step = job.step
        session.job = job
        try:
            job.rows = self._rows(session, step)
            self._settle(session, step)
        except (RewindRefused, CodecError, BadStep) as error:
            self._fail(key, BadStep(str(error)))
            return
        except PoolExhausted as error:
            self._fail(key, StepFailed(str(error)))
            return
        self._scheduler.add(
            Ready(key, session.tenant, len(job.rows), step.base, step.prefill, session.priority, step.deadline)
        )

    def _resume(self, key: bytes, length: int, commit: Sequence[int]) -> str:
        """Why it is impossible; empty where it is done."""
        session = self._sessions.get(key)
        if session is None or session.broken:
            return "the session has ended"
        self._scheduler.cancel(key)
        session.job = None
        session.waiting.clear()
        cache = session.cache
        # Fewer rows: the pending ones are of the step that `commit` is about. Else they are of a step to undo.
        kept = commit if cache.length < length else ()
        if cache.length + len(kept) < length or list(kept) != sorted({*kept} & {*range(cache.pending)}):
            return f"cannot resume at {length} rows: {cache.length} are cached"
        try:
            self._commit(session, kept)
            self.pool.rewind(cache, length)
        except (PoolExhausted, RewindRefused) as error:
            return str(error)
        session.history.truncate(length)
        session.pending_ids = ()
        return ""

    def _commit(self, session: _Session, rows: Sequence[int]) -> None:
        """Keep these rows of the step before, drop the others."""
        self.pool.commit(session.cache, rows)
        if session.pending_ids:
            session.history.ids.extend(session.pending_ids[row] for row in rows)

    def _rows(self, session: _Session, step: StepInput) -> Tensor:
        if session.blocks.start == 0 and step.ids:
            return torch.tensor(step.ids)
        return decode_rows(session.codec, step.hidden, self.span.hidden_size)

    def _is_tail(self, session: _Session) -> bool:
        return session.blocks.stop == self.span.n_blocks

    def _settle(self, session: _Session, step: StepInput) -> None:
        """Apply what the step says of the one before: its commit, then a rewind."""
        cache, history = session.cache, session.history
        if cache.pending:
            assert step.commit is not None
            self._commit(session, step.commit)
        if step.rewind is not None:
            self.pool.rewind(cache, step.rewind)
            history.truncate(step.rewind)
        assert cache.length == step.base
        if step.history is not None:
            session.history = history = step.history
        if step.sample and self._is_tail(session) and len(history.ids) != step.base:
            raise BadStep(f"{len(history.ids)} of {step.base} cached ids are known here; a tail that samples needs all")
        if step.sampling is not None:
            session.sampling = step.sampling
        session.pending_ids = () if step.prefill else step.ids
        if step.prefill and self._is_tail(session):
            history.ids.extend(step.ids)
            history.prompt_length = len(history.ids)

    def _iterate(self) -> None:
        now = time.monotonic()
        for late in self._scheduler.expired(now):
            self._fail(late.key, DeadlinePassed("the step's deadline passed before its turn"))
        chunks = self._scheduler.take(now)
        if not chunks:
            return
        started_ns = time.monotonic_ns()
        try:
            outputs = self._executor.run([self._segment(chunk) for chunk in chunks])
        except Exception as error:
            # The thread outlives whatever one batch of strangers' steps may do to it.
            log.exception("an iteration of %d steps failed", len(chunks))
            for chunk in chunks:
                self._fail(chunk.step.key, StepFailed(f"compute failed: {error}"))
            return
        ended_ns = time.monotonic_ns()
        for chunk, hidden in zip(chunks, outputs, strict=True):
            self._collect(chunk, hidden, started_ns, ended_ns)
        self._answer([chunk.step.key for chunk in chunks if chunk.last])
        self._iteration_end_ns = time.monotonic_ns()
        self._batching.ran(now, time.monotonic(), sum(not chunk.step.prefill for chunk in chunks))

    def _segment(self, chunk: Chunk[bytes]) -> Segment:
        session = self._sessions[chunk.step.key]
        assert session.job is not None
        parents = chain(chunk.stop - chunk.start) if session.job.step.prefill else session.job.step.parents
        rows = session.job.rows[chunk.start : chunk.stop]
        return Segment(session.cache, rows, parents, depths(parents), session.blocks)

    def _collect(self, chunk: Chunk[bytes], hidden: Tensor, started_ns: int, ended_ns: int) -> None:
        session = self._sessions[chunk.step.key]
        job = session.job
        assert job is not None
        if not job.hidden:
            job.started_ns = started_ns
            job.queued_ns = max(0, min(self._iteration_end_ns, started_ns) - job.submitted_ns)
        job.ended_ns = ended_ns
        job.hidden.append(hidden)
        if job.step.prefill:
            self.pool.commit(session.cache, range(len(hidden)))

    def _answer(self, keys: Sequence[bytes]) -> None:
        """Hand out the results of the steps that are through; a batch goes through the LM head at once."""
        try:
            scored = self._score(keys)
        except Exception as error:
            log.exception("the LM head failed on %d steps", len(keys))
            for key in keys:
                self._fail(key, StepFailed(f"compute failed: {error}"))
            return
        for key in keys:
            session = self._sessions[key]
            job = session.job
            assert job is not None
            try:
                output = self._output(session, job, scored.get(key))
            except SamplingError as error:
                self._fail(key, StepFailed(str(error)))
                continue
            session.job = None
            job.done(output)
            if session.waiting:
                self._begin(key, session)

    def _score(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Logits of the rows that need them, for each session whose tail this is."""
        rows: dict[bytes, Tensor] = {}
        for key in keys:
            session = self._sessions[key]
            job = session.job
            assert job is not None
            if self._is_tail(session) and (job.step.sample or job.step.want_logits):
                whole = job.step.want_logits or not job.step.prefill
                rows[key] = torch.cat(job.hidden) if whole else job.hidden[-1][-1:]
        if not rows:
            return {}
        logits = self.span.logits(torch.cat(list(rows.values())))
        return dict(zip(rows, logits.split([len(part) for part in rows.values()]), strict=True))

    def _fail(self, key: bytes, failure: StepFailed) -> None:
        """End the session's work: what follows a failed step would run on a state that nobody agreed to."""
        self._scheduler.cancel(key)
        session = self._sessions[key]
        job, session.job = session.job, None
        session.broken = True
        session.waiting.clear()
        assert job is not None
        job.done(failure)

    def _output(self, session: _Session, job: _Job, logits: Tensor | None) -> StepOutput:
        step = job.step
        values = None if logits is None else logits.float().cpu().numpy()
        hidden = b""
        if step.want_hidden or not self._is_tail(session):
            hidden = encode(session.codec, torch.cat(job.hidden).float().cpu().numpy())
        return StepOutput(
            hidden,
            None if values is None or not step.sample else self._verdict(session, step, values),
            values.tobytes() if values is not None and step.want_logits else b"",
            job.started_ns,
            job.ended_ns,
            job.queued_ns,
        )

    def _verdict(self, session: _Session, step: StepInput, logits: NDArray[np.float32]) -> VerificationResult:
        if step.prefill:
            return draw_after_prefill(logits[-1], session.sampling, session.history, step.top_logprobs)
        tree = DraftTree(tuple(step.ids), tuple(step.parents))
        return verify(tree, logits, session.sampling, session.history, step.base, step.top_logprobs)
