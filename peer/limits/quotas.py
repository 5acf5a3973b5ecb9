"""What one client may take of a peer, by its role and labels, and how much of the peer's time a lab gets."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...protocol.trust.trust import Principal
from .refused import Refused

# Clients remembered after their last session.
_KNOWN = 4096


@dataclass(frozen=True)
class Quota:
    """Limits of one client; None is none. `tree_nodes`: drafted tokens of one step.

    priority: the highest that counts against other clients; above it, a client orders its own sessions only.
    """

    sessions: int | None = None
    tokens_per_minute: int | None = None
    cache_tokens: int | None = None
    tree_nodes: int | None = None
    priority: int = 0


@dataclass(frozen=True)
class Rule:
    """A quota for whoever has this role and this label; what is left out fits everybody."""

    quota: Quota
    role: str | None = None
    label: str | None = None

    def fits(self, principal: Principal) -> bool:
        labels = {f"{label}={value}" for label, value in principal.labels}
        return self.role in (None, principal.role) and (self.label is None or self.label in labels)


@dataclass(frozen=True)
class Quotas:
    """The first rule that fits a client counts. `weights`: of labs beside each other, 1 where none is given."""

    rules: tuple[Rule, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Quotas:
        """From a JSON file such as {"quotas": [{"label": "lab=a", "sessions": 4}], "weights": {"a": 2}}.

        Raises ValueError, OSError.
        """
        try:
            said = json.loads(path.read_text())
            unknown = said.keys() - {"quotas", "weights"}
            rules = tuple(map(_rule, said.get("quotas", ())))
            weights = {str(lab): float(weight) for lab, weight in said.get("weights", {}).items()}
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no quotas: {error}") from error
        if unknown or not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
            raise ValueError(f"{path} holds quotas and weights above 0 only, not {', '.join(unknown) or weights}")
        return cls(rules, weights)

    def of(self, principal: Principal) -> Quota:
        return next((rule.quota for rule in self.rules if rule.fits(principal)), Quota())

    def weight(self, share: str) -> float:
        return self.weights.get(share, 1.0)


NO_QUOTAS = Quotas()


class QuotaUsage:
    """What one client holds and has used, beside what it may."""

    def __init__(self, principal: Principal, quota: Quota, weight: float) -> None:
        self.principal = principal
        self.quota = quota
        self.weight = weight
        # Whether `spend` has anything to say.
        self.is_limited = quota.tokens_per_minute is not None
        self._held: dict[bytes, int] = {}
        self._tokens = float(quota.tokens_per_minute or 0)
        self._filled_at = time.monotonic()

    @property
    def idle(self) -> bool:
        return not self._held

    def open(self, session: bytes, tokens: int) -> None:
        """Raises Refused where this would be more than the client may hold."""
        quota, held = self.quota, sum(self._held.values())
        if quota.sessions is not None and len(self._held) >= quota.sessions:
            raise Refused(f"your quota here is {quota.sessions} sessions; end one, or retry in 2 s")
        if quota.cache_tokens is not None and held + tokens > quota.cache_tokens:
            final = tokens > quota.cache_tokens
            raise Refused(
                f"your quota here is {quota.cache_tokens} cache tokens, {held} are held; ask for fewer", final
            )
        self._held[session] = tokens

    def close(self, session: bytes) -> None:
        self._held.pop(session, None)

    def spend(self, tokens: int) -> None:
        """Raises Refused where the client was faster than it may; a burst may take a whole minute's tokens."""
        rate = self.quota.tokens_per_minute
        if rate is None:
            return
        now = time.monotonic()
        self._tokens = min(float(rate), self._tokens + (now - self._filled_at) * rate / 60)
        self._filled_at = now
        if tokens > self._tokens:
            wait_s = (min(tokens, rate) - self._tokens) * 60 / rate
            raise Refused(f"your quota here is {rate} tokens a minute; retry in {wait_s:.0f} s", final=tokens > rate)
        self._tokens -= tokens


class QuotaUsages:
    """Every client's, also after its last session: who comes again finds what it had used."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._of: dict[str, QuotaUsage] = {}

    def of(self, principal: Principal) -> QuotaUsage:
        """A client's usage; its labels may have changed with its certificate."""
        quota = self._quotas.of(principal)
        known = self._of.pop(principal.name, None)
        if known is None or known.quota != quota:
            known = QuotaUsage(principal, quota, self._quotas.weight(principal.share))
        self._of[principal.name] = known
        if len(self._of) > _KNOWN:
            self._forget()
        return known

    def _forget(self) -> None:
        oldest = next((name for name, usage in self._of.items() if usage.idle), None)
        if oldest is not None:
            del self._of[oldest]


def _rule(said: Mapping[str, Any]) -> Rule:
    limits = {limit.name for limit in fields(Quota)}
    if unknown := said.keys() - limits - {"role", "label"}:
        raise ValueError(f"there is no limit {min(unknown)!r}, only {', '.join(sorted(limits))}")
    values = {limit: said[limit] for limit in limits & said.keys()}
    if not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ValueError("limits are whole numbers")
    return Rule(Quota(**values), said.get("role"), said.get("label"))
