"""Which rows run next: pure planning, no torch and no sockets.

Each iteration takes every ready step that fits the token budget: decode and tree steps first, whole; then prefill in
chunks, so that a decode step never waits for a whole prompt. Within a class: higher priority first, then the client
that has been served least, then the oldest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Ready(Generic[Key]):
    """A step that waits for compute. `done` of its `rows` have run; only a prefill runs in parts."""

    key: Key
    client: bytes
    rows: int
    context: int
    prefill: bool = False
    priority: int = 0
    deadline: float | None = None
    order: int = 0
    done: int = 0


@dataclass(frozen=True)
class Slice(Generic[Key]):
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
    rows_beside_decode: int = 32
    context_scale: int = 3072
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
    _served: defaultdict[bytes, float] = field(default_factory=lambda: defaultdict(float))
    _orders: int = 0
    _last_decode: float = float("-inf")

    def __len__(self) -> int:
        return len(self._ready)

    def __contains__(self, key: Key) -> bool:
        return key in self._ready

    def add(self, step: Ready[Key]) -> None:
        assert step.key not in self._ready
        assert step.rows > 0
        self._orders += 1
        step.order = self._orders
        if step.client not in {ready.client for ready in self._ready.values()}:
            # A client that comes back owes nothing for the past and gains nothing from having been away.
            waiting = [self._served[ready.client] for ready in self._ready.values()]
            self._served[step.client] = max(self._served[step.client], min(waiting, default=0.0))
        self._ready[step.key] = step

    def cancel(self, key: Key) -> None:
        self._ready.pop(key, None)

    def expired(self, now: float) -> list[Ready[Key]]:
        """Remove and return the steps whose deadline has passed before any of their rows ran."""
        late = [s for s in self._ready.values() if s.deadline is not None and s.deadline < now and not s.done]
        for step in late:
            del self._ready[step.key]
        return late

    def take(self, now: float) -> list[Slice[Key]]:
        """The slices of the next iteration; steps that they finish leave the scheduler."""
        steps = list(self._ready.values())
        decodes = self._take_decodes([s for s in steps if not s.prefill])
        if decodes:
            self._last_decode = now
        slices = decodes + self._take_prefills([s for s in steps if s.prefill], decodes, now)
        if not any(s.prefill for s in steps) and len(self._served) > 1024:
            self._served.clear()
        return [self._account(piece) for piece in slices]

    def _take_decodes(self, steps: Iterable[Ready[Key]]) -> list[Slice[Key]]:
        slices: list[Slice[Key]] = []
        spent = 0.0
        for step in self._by_turn(steps):
            cost = self.budget.cost(step.rows, step.context)
            if slices and spent + cost > self.budget.rows:
                break
            slices.append(Slice(step, 0, step.rows))
            spent += cost
        return slices

    def _take_prefills(self, steps: Iterable[Ready[Key]], decodes: list[Slice[Key]], now: float) -> list[Slice[Key]]:
        beside_decode = decodes or now - self._last_decode < self.budget.decode_memory_s
        left = float(self.budget.rows_beside_decode if beside_decode else self.budget.rows)
        slices: list[Slice[Key]] = []
        for step in self._by_turn(steps):
            context = step.context + step.done
            rows = min(step.rows - step.done, self.budget.rows_for(left, context))
            if rows <= 0:
                if slices:
                    break
                rows = 1
            slices.append(Slice(step, step.done, step.done + rows))
            left -= self.budget.cost(rows, context)
        return slices

    def _by_turn(self, steps: Iterable[Ready[Key]]) -> list[Ready[Key]]:
        return sorted(steps, key=lambda s: (-s.priority, self._served[s.client], s.order))

    def _account(self, piece: Slice[Key]) -> Slice[Key]:
        step = piece.step
        self._served[step.client] += self.budget.cost(piece.stop - piece.start, step.context + piece.start)
        step.done = piece.stop
        if piece.last:
            del self._ready[step.key]
        return piece
