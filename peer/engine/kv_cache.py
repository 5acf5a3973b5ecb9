"""The paged KV pool: pages are reference-counted, grown lazily, shared by forks and copied when written.

A session's cache is a page table per layer group; layers with the same attention window form a group, and a windowed
group lets go of pages that no later row can see. Slot s of a session lives in page table[s // PAGE], at s % PAGE.
Committed slots [0, length) hold positions 0 … length - 1; the rows of the step in flight follow as pending slots.
Only the compute thread touches a pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model import LayerSpec

PAGE = 16
DROPPED = -1


class PoolExhausted(RuntimeError):
    """No page is free: a session outgrew its reservation, or reservations outgrew the pool."""


class RewindRefused(ValueError):
    """The rows asked back were dropped with their window; the client must replay them."""


@dataclass
class SessionCache:
    """One session's rows: a page table per group, committed length and pending rows."""

    tables: list[list[int]]
    length: int = 0
    pending: int = 0


@dataclass
class LayerGroup:
    """Layers that share one window, hence one page table a session."""

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

    def share(self, table: Iterable[int]) -> list[int]:
        table = list(table)
        self.references.update(page for page in table if page != DROPPED)
        return table

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page == DROPPED:
                continue
            self.references[page] -= 1
            if not self.references[page]:
                del self.references[page]
                self.free.append(page)


class KVPool:
    """Keys and values of every layer, preallocated: [n_pages, PAGE, kv_heads, width] each."""

    def __init__(
        self, layers: Sequence[LayerSpec], tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.n_pages = -(-tokens // PAGE)
        windows = sorted({spec.window for spec in layers}, key=lambda window: window or 0)
        self.groups = [
            LayerGroup(window, [i for i, spec in enumerate(layers) if spec.window == window], self.n_pages)
            for window in windows
        ]
        self.group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        shape = (self.n_pages, PAGE)
        # Zeroed, so that the memory is really there: nothing runs out of it later.
        self.keys = [torch.zeros(*shape, s.kv_heads, s.key_width, dtype=dtype, device=device) for s in layers]
        self.values = [torch.zeros(*shape, s.kv_heads, s.value_width, dtype=dtype, device=device) for s in layers]

    @property
    def free_pages(self) -> int:
        return min(len(group.free) for group in self.groups)

    def open(self) -> SessionCache:
        return SessionCache([[] for _ in self.groups])

    def fork(self, cache: SessionCache) -> SessionCache:
        """A clone that shares every page, pending rows included."""
        tables = [group.share(table) for group, table in zip(self.groups, cache.tables, strict=True)]
        return SessionCache(tables, cache.length, cache.pending)

    def release(self, cache: SessionCache) -> None:
        for group, table in zip(self.groups, cache.tables, strict=True):
            group.release(table)
        cache.tables = [[] for _ in self.groups]
        cache.length = cache.pending = 0

    def append(self, cache: SessionCache, rows: int) -> None:
        """Make slots for `rows` pending rows behind the committed ones. PoolExhausted leaves everything as it was."""
        first = cache.length + cache.pending
        self._require(cache, first, first + rows)
        cache.pending += rows
        for g in range(len(self.groups)):
            self._grow(g, cache.tables[g], cache.length + cache.pending)
            self._make_writable(g, cache.tables[g], first, cache.length + cache.pending)

    def commit(self, cache: SessionCache, rows: Sequence[int]) -> None:
        """Keep these pending rows, in increasing order, gathered in place; drop the others.

        Rows that move out of shared pages need new ones; PoolExhausted leaves everything as it was.
        """
        if list(rows) != list(range(len(rows))):
            self._gather(cache, rows)
        cache.length += len(rows)
        cache.pending = 0
        self._trim(cache)

    def rewind(self, cache: SessionCache, length: int) -> None:
        """Keep only the first `length` committed rows."""
        assert cache.pending == 0
        assert length <= cache.length
        for group, table in zip(self.groups, cache.tables, strict=True):
            seen = range(max(0, length - (group.window or length) + 1) // PAGE, -(-length // PAGE))
            if DROPPED in table[seen.start : seen.stop]:
                raise RewindRefused(
                    f"cannot rewind to {length}: rows in the window of {group.window} were dropped; replay the session"
                )
        cache.length = length
        self._trim(cache)

    def check(self, caches: Iterable[SessionCache]) -> None:
        """Integrity: every page is free or referenced exactly as often as tables name it."""
        caches = list(caches)
        for g, group in enumerate(self.groups):
            named = Counter(page for cache in caches for page in cache.tables[g] if page != DROPPED)
            assert named == group.references, f"group {g}: tables and reference counts differ"
            assert len(group.free) == len(set(group.free)), f"group {g}: a page is free twice"
            assert set(group.free) | set(named) == set(range(group.n_pages)), f"group {g}: a page is lost"
            assert not set(group.free) & set(named), f"group {g}: a page in use is free"
            for cache in caches:
                assert len(cache.tables[g]) == -(-(cache.length + cache.pending) // PAGE)

    def read(self, cache: SessionCache, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in any shape of slots, [*slots, kv_heads, width] each."""
        at = self._at(cache, layer, slots)
        return self.keys[layer][at], self.values[layer][at]

    def write(self, cache: SessionCache, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, as `read` gives them, in pending slots."""
        at = self._at(cache, layer, slots)
        self.keys[layer][at] = keys.to(self.keys[layer].dtype)
        self.values[layer][at] = values.to(self.values[layer].dtype)

    def _at(self, cache: SessionCache, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        pages = torch.tensor(cache.tables[self.group_of[layer]])
        return pages[slots // PAGE], slots % PAGE

    def _require(self, cache: SessionCache, first: int, end: int) -> None:
        """Raise PoolExhausted unless there are pages to make slots [first, end) exist and be writable."""
        for group, table in zip(self.groups, cache.tables, strict=True):
            new = max(0, -(-end // PAGE) - len(table))
            shared = sum(group.references[page] > 1 for page in table[first // PAGE : -(-end // PAGE)])
            if new + shared > len(group.free):
                raise PoolExhausted(
                    f"{new + shared} pages of the KV pool are needed, {len(group.free)} of {group.n_pages} are free"
                )

    def _grow(self, g: int, table: list[int], slots: int) -> None:
        while len(table) * PAGE < slots:
            table.append(self.groups[g].take())

    def _make_writable(self, g: int, table: list[int], first: int, end: int) -> None:
        """Copy pages that another session shares before slots [first, end) are written."""
        group = self.groups[g]
        for index in range(first // PAGE, -(-end // PAGE)):
            page = table[index]
            if group.references[page] == 1:
                continue
            table[index] = group.take()
            group.release([page])
            for layer in group.layers:
                self.keys[layer][table[index]] = self.keys[layer][page]
                self.values[layer][table[index]] = self.values[layer][page]

    def _gather(self, cache: SessionCache, rows: Sequence[int]) -> None:
        self._require(cache, cache.length, cache.length + len(rows))
        for g, group in enumerate(self.groups):
            table = cache.tables[g]
            self._make_writable(g, table, cache.length, cache.length + len(rows))
            pages = torch.tensor(table)
            source = cache.length + torch.tensor(rows)
            target = cache.length + torch.arange(len(rows))
            for layer in group.layers:
                for pool in (self.keys[layer], self.values[layer]):
                    pool[pages[target // PAGE], target % PAGE] = pool[pages[source // PAGE], source % PAGE]

    def _trim(self, cache: SessionCache) -> None:
        """Release pages behind the committed rows, and those before every later row's window."""
        for group, table in zip(self.groups, cache.tables, strict=True):
            kept = -(-cache.length // PAGE)
            group.release(table[kept:])
            del table[kept:]
            if group.window is not None:
                unseen = max(0, cache.length - group.window + 1) // PAGE
                group.release(table[:unseen])
                table[:unseen] = [DROPPED] * min(unseen, len(table))

    def page_table(self, caches: Sequence[SessionCache], g: int) -> Tensor:
        """Page ids of group g, [sessions, longest table] int32, padded with DROPPED."""
        tables = [cache.tables[g] for cache in caches]
        width = max(map(len, tables))
        return torch.tensor([table + [DROPPED] * (width - len(table)) for table in tables], dtype=torch.int32)
