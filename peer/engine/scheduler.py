"""Which rows run next: pure planning, no torch and no sockets.

Each iteration takes every ready step that fits the token budget: decode and tree steps first, whole; then prefill in
chunks, so that a decode step never waits for a whole prompt. Within a class: higher granted priority first, then the
lab that has been served least by its weight, then its client that has, then the oldest. A client's own steps go by the
priority that it gave them, whatever was granted: that takes nothing from anybody else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .fair_queue import Tenant, TenantQueue

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Ready(Generic[Key]):
    """A step that waits for compute. `done` of its `rows` have run; only a prefill runs in parts."""

    key: Key
    tenant: Tenant
    rows: int
    context: int
    prefill: bool = False
    priority: int = 0
    deadline: float | None = None
    order: int = 0
    done: int = 0

    @property
    def precedence(self) -> int:
        """The priority that counts against other clients."""
        return max(0, min(self.priority, self.tenant.granted))


@dataclass(frozen=True)
class Chunk(Generic[Key]):
    """Rows [start, stop) of a ready step, to run in this iteration."""

    step: Ready[Key]
    start: int
    stop: int

    @property
    def last(self) -> bool:
        return self.stop == self.step.rows


@dataclass(frozen=True)
class Budget:
    """Row budgets of one iteration, in rows without context; a row over `context_scale` cached ones counts double."""

    rows: int = 1024
    rows_beside_decode: int = 24
    context_scale: int = 1200
    decode_memory_s: float = 1.0

    def cost(self, rows: int, context: int) -> float:
        return rows * (1 + context / self.context_scale)

    def rows_for(self, cost: float, context: int) -> int:
        return int(cost / (1 + context / self.context_scale))


@dataclass
class Scheduler(Generic[Key]):
    """Ready steps of all sessions, at most one a session."""

    budget: Budget = field(default_factory=Budget)
    _ready: dict[Key, Ready[Key]] = field(default_factory=dict)
    # A step that is ready alone stands in no queue: there is nobody to be fair to.
    _sole: Ready[Key] | None = None
    # One for each class: what decoding cost a client says nothing of its turn to prefill.
    _queues: dict[tuple[int, bool], TenantQueue] = field(default_factory=dict)
    _orders: int = 0
    _last_decode: float = float("-inf")

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def decodes(self) -> int:
        """Steps that wait and are no prefill."""
        return sum(not step.prefill for step in self._ready.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._ready

    def add(self, step: Ready[Key]) -> None:
        assert step.key not in self._ready
        assert step.rows > 0
        self._orders += 1
        step.order = self._orders
        if not self._ready:
            self._sole = step
        else:
            if self._sole:
                self._join(self._sole)
                self._sole = None
            self._join(step)
        self._ready[step.key] = step

    def _join(self, step: Ready[Key]) -> None:
        self._queues.setdefault((step.precedence, step.prefill), TenantQueue()).join(step.tenant)

    def cancel(self, key: Key) -> None:
        if key in self._ready:
            self._remove(self._ready[key])

    def _remove(self, step: Ready[Key]) -> None:
        del self._ready[step.key]
        if step is self._sole:
            self._sole = None
            return
        queue = self._queue_of(step)
        queue.leave(step.tenant)
        if not queue.clients.waiting:
            del self._queues[step.precedence, step.prefill]

    def _queue_of(self, step: Ready[Key]) -> TenantQueue:
        return self._queues[step.precedence, step.prefill]

    def expired(self, now: float) -> list[Ready[Key]]:
        """Remove and return the steps whose deadline has passed before any of their rows ran."""
        late = [s for s in self._ready.values() if s.deadline is not None and s.deadline < now and not s.done]
        for step in late:
            self._remove(step)
        return late

    def take(self, now: float) -> list[Chunk[Key]]:
        """The chunks of the next iteration; steps that they finish leave the scheduler."""
        if self._sole and not self._sole.prefill:
            return [self._take_sole(now)]
        steps = list(self._ready.values())
        decodes = self._take_decodes([s for s in steps if not s.prefill])
        if decodes:
            self._last_decode = now
        chunks = decodes + self._take_prefills([s for s in steps if s.prefill], decodes, now)
        for chunk in chunks:
            self._charge(chunk)
        for chunk in chunks:
            if chunk.last:
                self._remove(chunk.step)
        for queue in self._queues.values():
            queue.forget()
        return chunks

    def _take_sole(self, now: float) -> Chunk[Key]:
        """All rows of the one decode step that is ready."""
        assert self._sole
        step, self._sole = self._sole, None
        del self._ready[step.key]
        self._last_decode = now
        step.done = step.rows
        return Chunk(step, 0, step.rows)

    def _take_decodes(self, steps: Sequence[Ready[Key]]) -> list[Chunk[Key]]:
        chunks: list[Chunk[Key]] = []
        spent = 0.0
        for step in self._by_turn(steps):
            cost = self.budget.cost(step.rows, step.context)
            if chunks and spent + cost > self.budget.rows:
                break
            chunks.append(Chunk(step, 0, step.rows))
            spent += cost
        return chunks

    def _take_prefills(self, steps: Sequence[Ready[Key]], decodes: list[Chunk[Key]], now: float) -> list[Chunk[Key]]:
        beside_decode = decodes or now - self._last_decode < self.budget.decode_memory_s
        left = float(self.budget.rows_beside_decode if beside_decode else self.budget.rows)
        chunks: list[Chunk[Key]] = []
        for step in self._by_turn(steps):
            context = step.context + step.done
            rows = min(step.rows - step.done, self.budget.rows_for(left, context))
            if rows <= 0:
                if chunks:
                    break
                rows = 1
            chunks.append(Chunk(step, step.done, step.done + rows))
            left -= self.budget.cost(rows, context)
        return chunks

    def _by_turn(self, steps: Sequence[Ready[Key]]) -> list[Ready[Key]]:
        if self._sole:
            return [*steps]
        arrived: dict[str, int] = {}  # a client's first step stands for all of them where clients are level
        for step in steps:
            arrived.setdefault(step.tenant.client, step.order)

        def turn(step: Ready[Key]) -> tuple[int, tuple[float, float], int, int, int]:
            served = self._queue_of(step).served(step.tenant)
            return -step.precedence, served, arrived[step.tenant.client], -step.priority, step.order

        return sorted(steps, key=turn)

    def _charge(self, chunk: Chunk[Key]) -> None:
        step = chunk.step
        step.done = chunk.stop
        if step is not self._sole:
            cost = self.budget.cost(chunk.stop - chunk.start, step.context + chunk.start)
            self._queue_of(step).charge(step.tenant, cost)
