"""Which page of the cache is whose: pages are reference-counted, grown lazily, shared by forks and copied when written.

A session has a block table for each layer group; layers with the same attention window form a group, and a windowed
group lets go of pages that no later row can see. Slot s of a session lives in page table[s // PAGE], at s % PAGE.
Committed slots [0, length) hold positions 0 … length - 1; the rows of the step in flight follow as pending slots.

Plain numbers only. What must be copied in the storage comes back as `Copy` and `Move`, to be done before anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PAGE = 16
DROPPED = -1


class CacheExhausted(RuntimeError):
    """No page is free: a session outgrew its reservation, or reservations outgrew the cache."""


class RewindRefused(ValueError):
    """The rows asked back were dropped with their window; the client must replay them."""


@dataclass
class BlockTable:
    """One session's rows: its pages in each group, committed length and pending rows."""

    pages: list[list[int]]
    length: int = 0
    pending: int = 0


@dataclass(frozen=True)
class Copy:
    """A group's page to be copied into another, which is about to be written."""

    group: int
    source: int
    target: int


@dataclass(frozen=True)
class Move:
    """A group's rows to be moved: places, page * PAGE + offset, all read before any is written."""

    group: int
    sources: Sequence[int]
    targets: Sequence[int]


@dataclass
class LayerGroup:
    """Layers that share one window, hence one list of pages a session."""

    window: int | None
    layers: list[int]
    n_pages: int
    free: list[int] = field(default_factory=list)
    references: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.free = list(range(self.n_pages - 1, -1, -1))

    def take(self) -> int:
        page = self.free.pop()
        self.references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        self.references.update(page for page in pages if page != DROPPED)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page == DROPPED:
                continue
            self.references[page] -= 1
            if not self.references[page]:
                del self.references[page]
                self.free.append(page)


class PageTable:
    """The pages of every layer group and whose they are."""

    def __init__(self, windows: Sequence[int | None], n_pages: int) -> None:
        """windows: by layer."""
        self.n_pages = n_pages
        kinds = sorted(set(windows), key=lambda window: window or 0)
        self.groups = [LayerGroup(w, [i for i, other in enumerate(windows) if other == w], n_pages) for w in kinds]
        self.group_of = [kinds.index(window) for window in windows]

    @property
    def free_pages(self) -> int:
        return min(len(group.free) for group in self.groups)

    def open(self) -> BlockTable:
        return BlockTable([[] for _ in self.groups])

    def fork(self, table: BlockTable) -> BlockTable:
        """A clone that shares every page, pending rows included."""
        pages = [group.share(pages) for group, pages in zip(self.groups, table.pages, strict=True)]
        return BlockTable(pages, table.length, table.pending)

    def release(self, table: BlockTable) -> None:
        for group, pages in zip(self.groups, table.pages, strict=True):
            group.release(pages)
        table.pages = [[] for _ in self.groups]
        table.length = table.pending = 0

    def append(self, table: BlockTable, rows: int) -> list[Copy]:
        """Make slots for `rows` pending rows behind the others. CacheExhausted leaves everything as it was."""
        first = table.length + table.pending
        self._require(table, first, first + rows)
        table.pending += rows
        copies: list[Copy] = []
        for g, group in enumerate(self.groups):
            pages = table.pages[g]
            while len(pages) * PAGE < first + rows:
                pages.append(group.take())
            copies += self._make_writable(g, pages, first, first + rows)
        return copies

    def commit(self, table: BlockTable, rows: Sequence[int]) -> tuple[list[Copy], list[Move]]:
        """Keep these pending rows, in increasing order, gathered in place; drop the others.

        Rows that move out of shared pages need new ones; CacheExhausted leaves everything as it was.
        """
        copies: list[Copy] = []
        moves: list[Move] = []
        if list(rows) != list(range(len(rows))):
            copies, moves = self._gather(table, rows)
        table.length += len(rows)
        table.pending = 0
        self._trim(table)
        return copies, moves

    def rewind(self, table: BlockTable, length: int) -> None:
        """Keep only the first `length` committed rows."""
        assert table.pending == 0
        assert length <= table.length
        for group, pages in zip(self.groups, table.pages, strict=True):
            seen = range(max(0, length - (group.window or length) + 1) // PAGE, -(-length // PAGE))
            if DROPPED in pages[seen.start : seen.stop]:
                raise RewindRefused(
                    f"cannot rewind to {length}: rows in the window of {group.window} were dropped; replay the session"
                )
        table.length = length
        self._trim(table)

    def places(self, table: BlockTable, group: int, slots: Iterable[int]) -> list[int]:
        """Where slots of a session lie in the storage."""
        pages = table.pages[group]
        return [pages[slot // PAGE] * PAGE + slot % PAGE for slot in slots]

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Integrity: every page is free or referenced exactly as often as tables name it."""
        tables = list(tables)
        for g, group in enumerate(self.groups):
            named = Counter(page for table in tables for page in table.pages[g] if page != DROPPED)
            assert named == group.references, f"group {g}: tables and reference counts differ"
            assert len(group.free) == len(set(group.free)), f"group {g}: a page is free twice"
            assert set(group.free) | set(named) == set(range(group.n_pages)), f"group {g}: a page is lost"
            assert not set(group.free) & set(named), f"group {g}: a page in use is free"
            for table in tables:
                assert len(table.pages[g]) == -(-(table.length + table.pending) // PAGE)

    def _require(self, table: BlockTable, first: int, end: int) -> None:
        """Raise CacheExhausted unless there are pages to make slots [first, end) exist and be writable."""
        for group, pages in zip(self.groups, table.pages, strict=True):
            new = max(0, -(-end // PAGE) - len(pages))
            shared = sum(group.references[page] > 1 for page in pages[first // PAGE : -(-end // PAGE)])
            if new + shared > len(group.free):
                raise CacheExhausted(
                    f"{new + shared} pages of the KV cache are needed, {len(group.free)} of {group.n_pages} are free"
                )

    def _make_writable(self, g: int, pages: list[int], first: int, end: int) -> list[Copy]:
        """Replace pages that another session shares before slots [first, end) are written."""
        group, copies = self.groups[g], []
        for index in range(first // PAGE, -(-end // PAGE)):
            page = pages[index]
            if group.references[page] == 1:
                continue
            pages[index] = group.take()
            group.release([page])
            copies.append(Copy(g, page, pages[index]))
        return copies

    def _gather(self, table: BlockTable, rows: Sequence[int]) -> tuple[list[Copy], list[Move]]:
        first = table.length
        self._require(table, first, first + len(rows))
        copies: list[Copy] = []
        moves: list[Move] = []
        for g in range(len(self.groups)):
            copies += self._make_writable(g, table.pages[g], first, first + len(rows))
            moved = [(first + row, first + i) for i, row in enumerate(rows) if row != i]
            sources, targets = (self.places(table, g, slots) for slots in zip(*moved, strict=True))
            moves.append(Move(g, sources, targets))
        return copies, moves

    def _trim(self, table: BlockTable) -> None:
        """Release pages behind the committed rows, and those before every later row's window."""
        for group, pages in zip(self.groups, table.pages, strict=True):
            kept = -(-table.length // PAGE)
            if kept < len(pages):
                group.release(pages[kept:])
                del pages[kept:]
            if group.window is not None:
                unseen = max(0, table.length - group.window + 1) // PAGE
                group.release(pages[:unseen])
                pages[:unseen] = [DROPPED] * min(unseen, len(pages))
