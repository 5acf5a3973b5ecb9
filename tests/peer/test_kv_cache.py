"""The KV cache against a naive model: every session is a plain list of row tags, written into the storage."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from petal.kernels.backend import LayerSpec
from petal.kernels.registry import backend_for
from petal.peer.engine.kv_cache import KVCache
from petal.peer.engine.page_table import DROPPED, PAGE, BlockTable, CacheExhausted, Copy, Move, PageTable, RewindRefused
from petal.protocol.wire.tree import RowTree, chain

WINDOW = 20
LAYERS = [LayerSpec(1, 2, 1, None), LayerSpec(2, 1, 1, WINDOW), LayerSpec(1, 1, 3, None)]
TOKENS = 18 * PAGE


@dataclass
class Model:
    """What a session should hold. `dropped`: slots below it went with the window."""

    table: BlockTable
    tags: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    parents: tuple[int, ...] = ()
    dropped: int = 0

    def settle(self, kept: list[int]) -> None:
        self.tags += [self.pending[row] for row in kept]
        self.pending, self.parents = [], ()
        self.dropped = max(self.dropped, (len(self.tags) - WINDOW + 1) // PAGE * PAGE)


def write(cache: KVCache, table: BlockTable, first: int, tags: list[int]) -> None:
    slots = torch.arange(first, first + len(tags))
    for layer, spec in enumerate(LAYERS):
        keys = torch.tensor(tags, dtype=torch.float32)[:, None, None].expand(-1, spec.kv_heads, -1)
        cache.write(table, layer, slots, keys, -keys)


def read(cache: KVCache, table: BlockTable, layer: int, first: int, end: int) -> list[int]:
    """Tags of slots [first, end), found the way attention finds them: through the page table."""
    pages = table.pages[cache.table.group_of[layer]]
    assert all(pages[slot // PAGE] >= 0 for slot in range(first, end)), "a visible row has no page"
    keys, values = cache.read(table, layer, torch.arange(first, end))
    tags = keys[:, 0, 0]
    assert (keys == tags[:, None, None]).all()
    assert (values == -tags[:, None, None]).all()
    return tags.int().tolist()


class CacheMachine(RuleBasedStateMachine):
    """Random lives of a few sessions in a cache that is a little too small for them."""

    cache_type: type[KVCache] = KVCache

    @initialize()
    def start(self) -> None:
        self.cache = self.cache_type(backend_for(), LAYERS, TOKENS)
        self.sessions: list[Model] = []
        self.tag = 0

    def _pick(self, index: int) -> Model:
        return self.sessions[index % len(self.sessions)]

    def _append(self, session: Model, parents: tuple[int, ...]) -> bool:
        before = (session.table.length, session.table.pending, [list(pages) for pages in session.table.pages])
        first = len(session.tags) + len(session.pending)
        try:
            self.cache.append(session.table, len(parents))
        except CacheExhausted:
            assert before == (session.table.length, session.table.pending, session.table.pages)
            assert self.cache.free_pages < (first + len(parents) - 1) // PAGE - first // PAGE + 1
            return False
        tags = list(range(self.tag + 1, self.tag + 1 + len(parents)))
        self.tag += len(parents)
        write(self.cache, session.table, first, tags)
        session.pending, session.parents = session.pending + tags, parents
        return True

    def _commit(self, session: Model, rows: list[int]) -> None:
        try:
            self.cache.commit(session.table, rows)
        except CacheExhausted:
            # The engine would end the session; here it may try again when there is room.
            return
        session.settle(rows)

    @precondition(lambda self: len(self.sessions) < 6)
    @rule()
    def open(self) -> None:
        self.sessions.append(Model(self.cache.open()))

    @precondition(lambda self: self.sessions)
    @rule(index=st.integers(0, 5), shape=st.lists(st.integers(0, 100), max_size=24))
    def grow_tree(self, index: int, shape: list[int]) -> None:
        session = self._pick(index)
        if not session.pending:
            self._append(session, (-1, *(choice % (row + 1) for row, choice in enumerate(shape))))

    @precondition(lambda self: any(s.pending for s in self.sessions))
    @rule(index=st.integers(0, 5), leaf=st.integers(0, 100))
    def commit_path(self, index: int, leaf: int) -> None:
        waiting = [s for s in self.sessions if s.pending]
        session = waiting[index % len(waiting)]
        tree = RowTree(session.parents)
        self._commit(session, tree.path(leaf % len(tree)))

    @precondition(lambda self: self.sessions)
    @rule(index=st.integers(0, 5), rows=st.integers(1, 60))
    def prefill(self, index: int, rows: int) -> None:
        session = self._pick(index)
        if not session.pending and self._append(session, chain(rows).parents):
            self._commit(session, list(range(rows)))

    @precondition(lambda self: 0 < len(self.sessions) < 6)
    @rule(index=st.integers(0, 5))
    def fork(self, index: int) -> None:
        parent = self._pick(index)
        clone = self.cache.fork(parent.table)
        self.sessions.append(Model(clone, list(parent.tags), list(parent.pending), parent.parents, parent.dropped))

    @precondition(lambda self: any(not s.pending for s in self.sessions))
    @rule(index=st.integers(0, 5), back=st.one_of(st.integers(0, 40), st.just(10**9)))
    def rewind(self, index: int, back: int) -> None:
        settled = [s for s in self.sessions if not s.pending]
        session = settled[index % len(settled)]
        length = max(0, len(session.tags) - back)
        needed = range(max(0, length - WINDOW + 1), length)
        lost = any(slot < session.dropped for slot in needed)
        try:
            self.cache.rewind(session.table, length)
        except RewindRefused:
            assert lost
        else:
            assert not lost
            del session.tags[length:]
            session.dropped = min(session.dropped, -(-length // PAGE) * PAGE)

    @precondition(lambda self: self.sessions)
    @rule(index=st.integers(0, 5))
    def release(self, index: int) -> None:
        session = self.sessions.pop(index % len(self.sessions))
        self.cache.release(session.table)

    @invariant()
    def every_visible_row_has_its_own_tag(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check(session.table for session in self.sessions)
        for session in self.sessions:
            rows = session.tags + session.pending
            assert (session.table.length, session.table.pending) == (len(session.tags), len(session.pending))
            for layer, spec in enumerate(LAYERS):
                first = max(0, len(session.tags) - spec.window + 1) if spec.window else 0
                assert read(self.cache, session.table, layer, first, len(rows)) == rows[first:]

    def teardown(self) -> None:
        for session in getattr(self, "sessions", []):
            self.cache.release(session.table)
        if hasattr(self, "cache"):
            self.cache.check([])
            assert self.cache.free_pages == self.cache.n_pages


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class NeverCopies(PageTable):
    """Writes into pages that a fork still reads."""

    def _make_writable(self, g: int, pages: list[int], first: int, end: int) -> list[Copy]:
        return []


class ForgetsToCopy(PageTable):
    """Takes pages of its own, without what was in those that it shared."""

    def append(self, table: BlockTable, rows: int) -> list[Copy]:
        super().append(table, rows)
        return []


class NeverGathers(PageTable):
    """Leaves accepted rows where the tree had them."""

    def _gather(self, table: BlockTable, rows: object) -> tuple[list[Copy], list[Move]]:
        return [], []


class DropsEarly(PageTable):
    """Lets go of one row that the window still shows."""

    def _trim(self, table: BlockTable) -> None:
        for group in self.groups:
            group.window = group.window and group.window - 1
        super()._trim(table)
        for group in self.groups:
            group.window = group.window and group.window + 1


class Leaks(PageTable):
    """Forgets to count a fork's pages."""

    def fork(self, table: BlockTable) -> BlockTable:
        return BlockTable([list(pages) for pages in table.pages], table.length, table.pending)


@pytest.mark.parametrize("broken", [NeverCopies, ForgetsToCopy, NeverGathers, DropsEarly, Leaks])
def test_the_machine_catches_a_broken_table(broken: type[PageTable]) -> None:
    class Broken(KVCache):
        page_table = broken

    class Machine(CacheMachine):
        cache_type = Broken

        def teardown(self) -> None:
            pass

    quick = settings(
        max_examples=400,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=quick)


def _table(pages: int) -> PageTable:
    return PageTable([spec.window for spec in LAYERS], pages)


def test_an_append_that_fails_in_the_second_group_changes_nothing():
    table = _table(3)
    cache, other = table.open(), table.open()
    table.append(other, PAGE)
    table.groups[1].take()  # only the windowed group is short now
    with pytest.raises(CacheExhausted, match="2 pages of the KV cache are needed, 1 of 3 are free"):
        table.append(cache, 2 * PAGE)
    assert cache == BlockTable([[], []])
    assert [len(group.free) for group in table.groups] == [2, 1]
    table.append(cache, PAGE)
    assert cache.pending == PAGE


def test_an_append_that_cannot_copy_a_shared_page_changes_nothing():
    table = _table(2)
    cache = table.open()
    table.append(cache, PAGE + 1)
    table.commit(cache, range(PAGE + 1))
    clone = table.fork(cache)
    with pytest.raises(CacheExhausted):
        table.append(clone, 1)
    table.check([cache, clone])
    table.release(cache)
    table.append(clone, 1)
    table.check([clone])


def test_a_commit_that_cannot_copy_a_shared_page_changes_nothing():
    table = _table(1)
    cache = table.open()
    table.append(cache, 3)
    clone = table.fork(cache)
    with pytest.raises(CacheExhausted):
        table.commit(clone, [0, 2])
    table.check([cache, clone])
    assert (clone.length, clone.pending) == (0, 3)
    table.commit(clone, [0, 1])  # nothing moves, so no page is needed
    assert (clone.length, clone.pending) == (2, 0)


def test_a_window_gives_its_pages_back():
    table = _table(8)
    cache = table.open()
    table.append(cache, 5 * PAGE)
    table.commit(cache, range(5 * PAGE))
    full, windowed = cache.pages
    assert DROPPED not in full
    assert windowed[:3] == [DROPPED] * 3  # slots 61 to 79 are in sight of row 80
    assert DROPPED not in windowed[3:]
    with pytest.raises(RewindRefused, match="rows in the window of 20 were dropped; replay the session"):
        table.rewind(cache, 4 * PAGE)
    assert cache.length == 5 * PAGE
    table.rewind(cache, 5 * PAGE - 10)
    table.rewind(cache, 0)
    assert cache == BlockTable([[], []])
    assert table.free_pages == 8


def test_a_forks_pages_outlive_its_parent():
    cache = KVCache(backend_for(), LAYERS, 4 * PAGE)
    parent = cache.open()
    cache.append(parent, 5)
    write(cache, parent, 0, [1, 2, 3, 4, 5])
    clone = cache.fork(parent)
    cache.release(parent)
    assert read(cache, clone, 0, 0, 5) == [1, 2, 3, 4, 5]
    cache.check([clone])


def test_rows_that_stay_where_they_are_are_not_moved():
    table = _table(4)
    session = table.open()
    table.append(session, 5)
    copies, moves = table.commit(session, [0, 1, 4])
    assert copies == []
    assert [(len(move.sources), len(move.targets)) for move in moves] == [(1, 1), (1, 1)]
