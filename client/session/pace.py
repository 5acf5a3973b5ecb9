"""How long an answer may take before its peers are asked whether they still compute."""

from __future__ import annotations

from collections import deque

# Of the slowest of late answers; and in any case, since other clients' work may come between.
MULTIPLE = 10.0
FLOOR_S = 5.0
# Before any answer is known.
FIRST_S = 30.0
_REMEMBERED = 32
# Rows of a step that take about the time of a single one.
_ROWS = 32


class StepPace:
    """What a session's late answers took; a step of many rows is so many steps."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._took: deque[float] = deque(maxlen=_REMEMBERED)

    def answered(self, rows: int, seconds: float) -> None:
        """A step of so many rows had its answer after so long."""
        self._took.append(seconds / _steps(rows))

    def patience_s(self, rows: int) -> float:
        """Seconds to wait for the answer of a step of so many rows."""
        usual = MULTIPLE * max(self._took) if self._took else FIRST_S
        return min(self._most_s, max(FLOOR_S, usual * _steps(rows)))


def _steps(rows: int) -> float:
    return max(1.0, rows / _ROWS)
