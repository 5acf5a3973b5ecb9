"""The compute thread: commands in, ragged iterations, results out. It never waits on the network.

The event loop posts commands and never blocks; results are handed back through callbacks that must not block either.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from ...kernels.activations import ActivationError
from ...protocol.grammar.grammar import GrammarMatcher
from ...protocol.petal_pb2 import Codec
from ...protocol.wire.sampling import SamplingError
from ..model import Span
from . import sampler
from .batching_window import BatchingWindow
from .fair_queue import Tenant
from .kv_cache import KVCache
from .page_table import CacheExhausted, RewindRefused
from .runner import ModelRunner
from .scheduler import Budget, Ready, Scheduler
from .sequence import CachedSequence
from .step import BadStep, DeadlinePassed, Done, Step, StepFailed, StepOutput

log = logging.getLogger(__name__)

# Quiet for so long, the compute thread checks its own bookkeeping.
IDLE_S = 1.0
# For the iteration at hand, where the peer ends.
STOP_S = 20.0
# Commands between two iterations, at most: a flood of them must not keep ready steps waiting.
MOST_COMMANDS = 256


class Engine:
    """Owns the KV cache and every session's sequence; runs on one thread of its own."""

    def __init__(self, span: Span, cache: KVCache, budget: Budget | None = None) -> None:
        self.span = span
        self.cache = cache
        self._runner = ModelRunner(span, cache)
        self.warm_up = self._runner.warm_up  # before `start`
        self._scheduler: Scheduler[bytes] = Scheduler(budget or Budget())
        self._sequences: dict[bytes, CachedSequence] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._batching = BatchingWindow()
        self._iteration_end_ns = 0
        self.lost = ""  # why the device computes no more, and this thread has ended
        self.thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # Called from the event loop.

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Finish the iteration at hand and end the thread; one that hangs is left behind."""
        self._commands.put(None)
        self.thread.join(STOP_S)

    def open(
        self,
        session: bytes,
        tenant: Tenant,
        codec: Codec,
        blocks: range,
        priority: int = 0,
        fork_of: bytes | None = None,
        grammar: GrammarMatcher | None = None,
    ) -> None:
        def open_() -> None:
            assert session not in self._sequences
            opened = CachedSequence(tenant, priority, codec, blocks, self.span, self.cache, self.cache.open(), grammar)
            if parent := self._sequences.get(fork_of or b""):
                opened.fork(parent)
            self._sequences[session] = opened

        self._commands.put(open_)

    def submit(self, session: bytes, step: Step, done: Done) -> None:
        """Queue a step behind the session's others; `done` is called on the compute thread."""
        step.submitted_ns = time.monotonic_ns()
        self._commands.put(lambda: self._queue(session, step, done))

    def resume(self, session: bytes, length: int, commit: Sequence[int], done: Callable[[str], None]) -> None:
        """Undo what the session does and go back to `length` rows, `commit` naming those that are not committed yet.

        `done` gets the reason where that is impossible; no `done` of an undone step is called after it.
        """

        def resume() -> None:
            self._scheduler.cancel(session)
            known = self._sequences.get(session)
            done("the session has ended" if known is None or known.broken else known.resume(length, commit))

        self._commands.put(resume)

    def close(self, session: bytes) -> None:
        """Forget a session at once, whatever it was doing; its pages are free before the next iteration."""

        def close() -> None:
            self._scheduler.cancel(session)
            if gone := self._sequences.pop(session, None):
                self.cache.release(gone.table)

        self._commands.put(close)

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the compute thread, between two iterations."""
        self._commands.put(function)

    def check(self) -> None:
        """Integrity of cache and sequences; on the compute thread."""
        self.cache.check(known.table for known in self._sequences.values())

    # On the compute thread.

    def _run(self) -> None:
        checked = False
        commands = 0
        while not self.lost:
            busy = len(self._scheduler) > 0
            if busy and commands >= MOST_COMMANDS:
                self._iterate()
                commands = 0
                continue
            wait = self._patience() if busy else None if checked else IDLE_S
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

    def _patience(self) -> float:
        """Seconds to wait for more steps; of a single session nobody else comes."""
        alone = len(self._sequences) == 1
        return 0.0 if alone else self._batching.wait(time.monotonic(), self._scheduler.decodes)

    def _queue(self, key: bytes, step: Step, done: Done) -> None:
        known = self._sequences.get(key)
        if known is None or known.broken:
            return  # closed or failed while the step was on its way
        known.waiting.append((step, done))
        if known.step is None:
            self._begin(key, known)

    def _begin(self, key: bytes, known: CachedSequence) -> None:
        """Make the session's next step ready for the scheduler."""
        try:
            step = known.begin()
        except (RewindRefused, ActivationError, BadStep, CacheExhausted) as error:
            self._fail(key, (StepFailed if isinstance(error, CacheExhausted) else BadStep)(str(error)))
            return
        rows, base, prefill = len(step.rows), step.header.base, step.header.prefill
        self._scheduler.add(Ready(key, known.tenant, rows, base, prefill, known.priority, step.deadline))

    def _iterate(self) -> None:
        now = time.monotonic()
        for late in self._scheduler.expired(now):
            self._fail(late.key, DeadlinePassed("the step's deadline passed before its turn"))
        chunks = self._scheduler.take(now)
        if not chunks:
            return
        started_ns = time.monotonic_ns()
        try:
            segments = [self._sequences[chunk.step.key].segment(chunk.start, chunk.stop) for chunk in chunks]
            outputs = self._runner.run(segments)
        except Exception as error:  # the thread outlives whatever strangers' steps may do to it
            self._fail_all([chunk.step.key for chunk in chunks], error)
            return
        ended_ns = time.monotonic_ns()
        for chunk, output in zip(chunks, outputs, strict=True):
            self._sequences[chunk.step.key].collect(output, started_ns, ended_ns, self._iteration_end_ns)
        self._answer([chunk.step.key for chunk in chunks if chunk.last])
        self._iteration_end_ns = time.monotonic_ns()
        if len(self._sequences) > 1:  # some may come back soon
            self._batching.ran(now, time.monotonic(), sum(not chunk.step.prefill for chunk in chunks))

    def _answer(self, keys: Sequence[bytes]) -> None:
        """Hand out the results of the steps that are through."""
        through = [self._sequences[key] for key in keys]
        try:
            scored = sampler.scores(self.span, through)
        except Exception as error:
            self._fail_all(keys, error)
            return
        for key, known, scores in zip(keys, through, scored, strict=True):
            self._finish(key, known, scores)

    def _finish(self, key: bytes, known: CachedSequence, scores: sampler.Scores | None) -> None:
        step, done = known.step, known.done
        assert step is not None
        assert done is not None
        try:
            output = StepOutput(known.encoded())
            if scores is not None:
                sampler.draw(known, step, scores, output)
        except SamplingError as error:
            self._fail(key, StepFailed(str(error)))
            return
        except Exception as error:
            self._fail_all([key], error)
            return
        known.step = known.done = None
        done(output)
        if known.waiting:
            self._begin(key, known)

    def _fail_all(self, keys: Sequence[bytes], error: Exception) -> None:
        """End the work of all that had a part in what failed; this thread, too, where the device computes no more."""
        log.error("%d steps failed", len(keys), exc_info=error)
        for key in keys:
            self._fail(key, StepFailed.by(error))
        self.lost = self.span.backend.failure()

    def _fail(self, key: bytes, failure: StepFailed) -> None:
        """End the session's work: what follows a failed step would run on a state that nobody agreed to."""
        self._scheduler.cancel(key)
        known = self._sequences[key]
        done, known.step, known.done = known.done, None, None
        known.broken = True
        known.waiting.clear()
        assert done is not None
        done(failure)
