"""Which rows run next: pure planning, no torch and no sockets.

Each iteration takes every ready step that fits the token budget: decode and tree steps first, whole; then prefill in
chunks, so that a decode step never waits for a whole prompt. Within a class: higher priority first, then the lab that
has been served least by its weight, then its client that has, then the oldest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Tenant:
    """Who is served: a client, and the lab with which it shares a turn of this weight."""

    client: str
    share: str = ""
    weight: float = 1.0


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
    rows_beside_decode: int = 24
    context_scale: int = 1200
    decode_memory_s: float = 1.0

    def cost(self, rows: int, context: int) -> float:
        return rows * (1 + context / self.context_scale)

    def rows_for(self, cost: float, context: int) -> int:
        return int(cost / (1 + context / self.context_scale))


@dataclass
class Turns:
    """How much everybody of one class was served for its weight, since the class last had nothing ready.

    `clock` is what somebody would have got who was ready all the time, each time a fair share (the virtual time of
    fair queueing). Who comes or returns starts there: it owes nothing for the past and gains nothing from having been
    away. Who is behind the clock and away is forgotten, so only those of the last few turns are remembered.
    """

    clock: float = 0.0
    served: dict[str, float] = field(default_factory=dict)
    waiting: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)

    def join(self, who: str, weight: float = 1.0) -> None:
        if not self.waiting[who]:
            self.served[who] = max(self.served.get(who, 0.0), self.clock)
        self.waiting[who] += 1
        self.weights[who] = weight

    def leave(self, who: str) -> None:
        self.waiting[who] -= 1
        if not self.waiting[who]:
            del self.waiting[who], self.weights[who]

    def charge(self, who: str, cost: float) -> None:
        self.served[who] += cost / self.weights[who]
        self.clock += cost / sum(self.weights.values())

    def forget(self) -> None:
        self.served = {who: cost for who, cost in self.served.items() if who in self.waiting or cost > self.clock}


@dataclass
class Accounts:
    """The turns of labs, and of clients among all."""

    labs: Turns = field(default_factory=Turns)
    clients: Turns = field(default_factory=Turns)

    def join(self, tenant: Tenant) -> None:
        self.labs.join(tenant.share, tenant.weight)
        self.clients.join(tenant.client)

    def leave(self, tenant: Tenant) -> None:
        self.labs.leave(tenant.share)
        self.clients.leave(tenant.client)

    def charge(self, tenant: Tenant, cost: float) -> None:
        self.labs.charge(tenant.share, cost)
        self.clients.charge(tenant.client, cost)

    def served(self, tenant: Tenant) -> tuple[float, float]:
        return self.labs.served[tenant.share], self.clients.served[tenant.client]

    def forget(self) -> None:
        self.labs.forget()
        self.clients.forget()


@dataclass
class Gathering:
    """How long to wait, after an iteration with decode steps, for their sessions to come back.

    Clients near by answer within a moment. To start with the first of them would split one batch into two, and a batch
    of two costs nearly what one of sixteen does; to start with a prefill would make them all wait for it. The patience
    follows what waiting brought.
    """

    most: float = 0.25
    least: float = 0.02
    patience: float = 0.1
    _expected: int = 0
    _until: float = 0.0

    def ran(self, started: float, ended: float, decodes: int) -> None:
        """An iteration is over, and with it `decodes` steps."""
        self._expected = decodes
        self._until = ended + self.patience * (ended - started)

    def wait(self, now: float, decodes: int) -> float:
        """Seconds to wait for more than the `decodes` steps that are ready; 0: run them."""
        if not self._expected:
            return 0.0
        if decodes >= self._expected:
            self.patience = min(self.most, self.patience * 1.5)
            self._expected = 0
            return 0.0
        left = self._until - now
        if left > 0:
            return left
        self.patience = max(self.least, self.patience * 0.8)
        self._expected = 0
        return 0.0


@dataclass
class Scheduler(Generic[Key]):
    """Ready steps of all sessions, at most one a session."""

    budget: Budget = field(default_factory=Budget)
    _ready: dict[Key, Ready[Key]] = field(default_factory=dict)
    # One for each class: what decoding cost a client says nothing of its turn to prefill.
    _accounts: dict[tuple[int, bool], Accounts] = field(default_factory=dict)
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
        self._accounts.setdefault((step.priority, step.prefill), Accounts()).join(step.tenant)
        self._ready[step.key] = step

    def cancel(self, key: Key) -> None:
        if key in self._ready:
            self._remove(self._ready[key])

    def _remove(self, step: Ready[Key]) -> None:
        del self._ready[step.key]
        accounts = self._accounts_of(step)
        accounts.leave(step.tenant)
        if not accounts.clients.waiting:
            del self._accounts[step.priority, step.prefill]

    def _accounts_of(self, step: Ready[Key]) -> Accounts:
        return self._accounts[step.priority, step.prefill]

    def expired(self, now: float) -> list[Ready[Key]]:
        """Remove and return the steps whose deadline has passed before any of their rows ran."""
        late = [s for s in self._ready.values() if s.deadline is not None and s.deadline < now and not s.done]
        for step in late:
            self._remove(step)
        return late

    def take(self, now: float) -> list[Slice[Key]]:
        """The slices of the next iteration; steps that they finish leave the scheduler."""
        steps = list(self._ready.values())
        decodes = self._take_decodes([s for s in steps if not s.prefill])
        if decodes:
            self._last_decode = now
        slices = decodes + self._take_prefills([s for s in steps if s.prefill], decodes, now)
        for piece in slices:
            self._account(piece)
        for piece in slices:
            if piece.last:
                self._remove(piece.step)
        for accounts in self._accounts.values():
            accounts.forget()
        return slices

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
        return sorted(steps, key=lambda s: (-s.priority, self._accounts_of(s).served(s.tenant), s.order))

    def _account(self, piece: Slice[Key]) -> None:
        step = piece.step
        cost = self.budget.cost(piece.stop - piece.start, step.context + piece.start)
        self._accounts_of(step).charge(step.tenant, cost)
        step.done = piece.stop
