"""How long an iteration waits for company."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BatchingWindow:
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
