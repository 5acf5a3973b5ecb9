"""Who is served next among those that wait: weighted fair queueing, for labs and for the clients of all labs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tenant:
    """Who is served: a client, and the lab with which it shares a turn of this weight.

    granted: the highest priority that counts against other clients.
    """

    client: str
    share: str = ""
    weight: float = 1.0
    granted: int = 0


@dataclass
class FairQueue:
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
class TenantQueue:
    """The fair queues of labs, and of clients among all."""

    labs: FairQueue = field(default_factory=FairQueue)
    clients: FairQueue = field(default_factory=FairQueue)

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
