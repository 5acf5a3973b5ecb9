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

import torch
from torch import Tensor

from ..protocol.codec import CodecError, encode
from ..protocol.petal_pb2 import Codec
from ..protocol.sampling import SamplingError, SamplingParams
from ..protocol.tree import DraftTree, chain, depths
from .decode import decode_rows
from .executor import Executor, Segment
from .pool import KVPool, PoolExhausted, RewindRefused, SessionCache
from .scheduler import Budget, Ready, Scheduler, Slice
from .span import Span
from .tail import TokenHistory, Verdict, draw_after_prefill, verify

log = logging.getLogger(__name__)

# Quiet for so long, the compute thread checks its own bookkeeping.
IDLE_S = 1.0


class StepFailed(RuntimeError):
    """A step that could not run; the message says why, for the client."""


class BadStep(StepFailed):
    """The step itself is at fault: activations that are none, rows that are no longer there."""


class DeadlinePassed(StepFailed):
    """The step waited for compute until its deadline."""


@dataclass(frozen=True)
class StepInput:
    """A checked step: token ids at head and tail; encoded hidden states of the peer before, except at the head.

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
    verdict: Verdict | None
    logits: bytes
    started_ns: int
    ended_ns: int
    queued_ns: int


Done = Callable[["StepOutput | StepFailed"], None]


@dataclass
class _Job:
    """A step on its way through the scheduler; a prefill collects the hidden states of its slices."""

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

    client: bytes
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
        client: bytes,
        codec: Codec,
        blocks: range,
        priority: int = 0,
        fork_of: bytes | None = None,
    ) -> None:
        self._post(lambda: self._open(session, _Session(client, priority, codec, blocks, self.pool.open()), fork_of))

    def submit(self, session: bytes, step: StepInput, done: Done) -> None:
        """Queue a step behind the session's others; `done` is called on the compute thread."""
        job = _Job(step, done, time.monotonic_ns())
        self._post(lambda: self._queue(session, job))

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
        while True:
            try:
                # With work at hand take only what is there; idle, wait, and check once that all is in order.
                busy = len(self._scheduler) > 0
                command = self._commands.get(not busy, timeout=None if checked else IDLE_S)
            except Empty:
                if busy:
                    self._iterate()
                    checked = False
                else:
                    self.check()
                    checked = True
                continue
            if command is None:
                return
            command()

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
        except (RewindRefused, CodecError) as error:
            self._fail(key, BadStep(str(error)))
            return
        except PoolExhausted as error:
            self._fail(key, StepFailed(str(error)))
            return
        self._scheduler.add(
            Ready(key, session.client, len(job.rows), step.base, step.prefill, session.priority, step.deadline)
        )

    def _rows(self, session: _Session, step: StepInput) -> Tensor:
        if session.blocks.start == 0:
            return torch.tensor(step.ids)
        return decode_rows(session.codec, step.hidden, self.span.hidden_size)

    def _is_tail(self, session: _Session) -> bool:
        return session.blocks.stop == self.span.n_blocks

    def _settle(self, session: _Session, step: StepInput) -> None:
        """Apply what the step says of the one before: its commit, then a rewind."""
        cache, history = session.cache, session.history
        if cache.pending:
            assert step.commit is not None
            self.pool.commit(cache, step.commit)
            if session.pending_ids:
                history.ids.extend(session.pending_ids[row] for row in step.commit)
        if step.rewind is not None:
            self.pool.rewind(cache, step.rewind)
            history.truncate(step.rewind)
        assert cache.length == step.base
        if step.history is not None:
            session.history = history = step.history
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
        slices = self._scheduler.take(now)
        if not slices:
            return
        started_ns = time.monotonic_ns()
        try:
            outputs = self._executor.run([self._segment(piece) for piece in slices])
        except Exception as error:
            # The thread outlives whatever one batch of strangers' steps may do to it.
            log.exception("an iteration of %d steps failed", len(slices))
            for piece in slices:
                self._fail(piece.step.key, StepFailed(f"compute failed: {error}"))
            return
        ended_ns = time.monotonic_ns()
        for piece, hidden in zip(slices, outputs, strict=True):
            try:
                self._collect(piece, hidden, started_ns, ended_ns)
            except Exception as error:
                if not isinstance(error, SamplingError):
                    log.exception("the answer to a step failed")
                self._fail(piece.step.key, StepFailed(str(error)))
        self._iteration_end_ns = time.monotonic_ns()

    def _segment(self, piece: Slice[bytes]) -> Segment:
        session = self._sessions[piece.step.key]
        assert session.job is not None
        parents = chain(piece.stop - piece.start) if session.job.step.prefill else session.job.step.parents
        rows = session.job.rows[piece.start : piece.stop]
        return Segment(session.cache, rows, parents, depths(parents), session.blocks)

    def _collect(self, piece: Slice[bytes], hidden: Tensor, started_ns: int, ended_ns: int) -> None:
        session = self._sessions[piece.step.key]
        job = session.job
        assert job is not None
        if not job.hidden:
            job.started_ns = started_ns
            job.queued_ns = max(0, min(self._iteration_end_ns, started_ns) - job.submitted_ns)
        job.ended_ns = ended_ns
        job.hidden.append(hidden)
        if job.step.prefill:
            self.pool.commit(session.cache, range(len(hidden)))
        if piece.last:
            output = self._output(session, job)
            session.job = None
            job.done(output)
            if session.waiting:
                self._begin(piece.step.key, session)

    def _fail(self, key: bytes, failure: StepFailed) -> None:
        """End the session's work: what follows a failed step would run on a state that nobody agreed to."""
        self._scheduler.cancel(key)
        session = self._sessions[key]
        job, session.job = session.job, None
        session.broken = True
        session.waiting.clear()
        assert job is not None
        job.done(failure)

    def _output(self, session: _Session, job: _Job) -> StepOutput:
        hidden = torch.cat(job.hidden) if len(job.hidden) > 1 else job.hidden[0]
        tail = self._is_tail(session)
        verdict, logits = self._verdict(session, job.step, hidden) if tail else (None, None)
        keep_hidden = not tail or job.step.want_hidden
        return StepOutput(
            encode(session.codec, hidden.float().cpu().numpy()) if keep_hidden else b"",
            verdict,
            b"" if logits is None else logits.float().cpu().numpy().tobytes(),
            job.started_ns,
            job.ended_ns,
            job.queued_ns,
        )

    def _verdict(self, session: _Session, step: StepInput, hidden: Tensor) -> tuple[Verdict | None, Tensor | None]:
        if not step.sample and not step.want_logits:
            return None, None
        whole = step.want_logits or not step.prefill
        logits = self.span.logits(hidden if whole else hidden[-1:])
        wanted = logits if step.want_logits else None
        if not step.sample:
            return None, wanted
        values = logits.float().cpu().numpy()
        if step.prefill:
            return draw_after_prefill(values[-1], session.sampling, session.history, step.top_logprobs), wanted
        tree = DraftTree(tuple(step.ids), tuple(step.parents))
        return verify(tree, values, session.sampling, session.history, step.base, step.top_logprobs), wanted
