"""What a peer keeps of its sessions' outputs, so that it can send them to a peer that takes another's place.

Committed rows only, encoded exactly as they were sent: the newcomer computes on the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence


class ReplayBudget:
    """Bytes that all logs of a peer may hold. Beyond them, the log that was idle for longest is lost."""

    def __init__(self, cap: int) -> None:
        self.used = 0
        self._cap = cap
        self._sizes: dict[ReplayLog, int] = {}  # by last use

    def touch(self, log: ReplayLog) -> None:
        """`log` was used just now, and may have changed its size."""
        self.forget(log)
        self._sizes[log] = log.size
        self.used += log.size
        while self.used > self._cap:
            next(iter(self._sizes)).lose()

    def forget(self, log: ReplayLog) -> None:
        """`log` holds nothing any more."""
        self.used -= self._sizes.pop(log, 0)


class ReplayLog:
    """One session's outputs: `rows` committed ones in order, and those of a tree until its commit is known."""

    def __init__(self, row_bytes: int, budget: ReplayBudget) -> None:
        self.rows = 0
        self.lost = False
        self._row_bytes = row_bytes
        self._budget = budget
        self._chunks: list[bytes] = []
        self._tree = b""

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.rows * self._row_bytes + len(self._tree)

    def append(self, outputs: bytes) -> None:
        """Rows that are committed at once, as those of a prefill."""
        if not self.lost:
            self._append(outputs)
            self._budget.touch(self)

    def hold(self, outputs: bytes) -> None:
        """Rows of a tree; the next step or a resumption says which of them stay."""
        if not self.lost:
            self._tree = outputs
            self._budget.touch(self)

    def apply(self, commit: Sequence[int], rewind: int | None) -> None:
        """Apply a step's word on the step before: its accepted rows, then a rewind."""
        if self.lost:
            return
        tree, size, self._tree = self._tree, self._row_bytes, b""
        if commit:
            self._append(b"".join(tree[row * size : (row + 1) * size] for row in commit))
        if rewind is not None:
            self._truncate(rewind)

    def resume(self, length: int, commit: Sequence[int]) -> None:
        """Keep `length` rows; where there are fewer, `commit` names the missing ones among the tree's."""
        self.apply(commit if self.rows < length else (), length)
        if self.rows != length:
            self.lose()

    def restart(self) -> None:
        """Every row comes again."""
        self._drop()
        self.lost = False

    def lose(self) -> None:
        """Drop everything, and record nothing until a restart."""
        self._drop()
        self.lost = True

    def fork(self) -> ReplayLog:
        """The same outputs for another session; each pays for them in full."""
        child = ReplayLog(self._row_bytes, self._budget)
        child.lost, child.rows = self.lost, self.rows
        child._chunks, child._tree = list(self._chunks), self._tree
        self._budget.touch(child)
        return child

    @property
    def chunks(self) -> tuple[bytes, ...]:
        """The committed rows as of now: whatever becomes of the log, they stay as they are."""
        return tuple(self._chunks)

    def _drop(self) -> None:
        self._budget.forget(self)
        self._chunks, self._tree, self.rows = [], b"", 0

    def _append(self, outputs: bytes) -> None:
        self._chunks.append(outputs)
        self.rows += len(outputs) // self._row_bytes

    def _truncate(self, rows: int) -> None:
        while self.rows > rows:
            last = self._chunks.pop()
            self.rows -= len(last) // self._row_bytes
            if self.rows < rows:
                self._append(last[: (rows - self.rows) * self._row_bytes])
