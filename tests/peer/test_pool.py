"""The KV pool against a naive model: every session is a plain list of row tags, written into the pool's tensors."""

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
from petal.peer.engine.kv_cache import DROPPED, PAGE, KVPool, PoolExhausted, RewindRefused, SessionCache
from petal.peer.model import LayerSpec
from petal.protocol.wire.tree import RowTree, chain

WINDOW = 20
LAYERS = [LayerSpec(1, 2, 1, None), LayerSpec(2, 1, 1, WINDOW), LayerSpec(1, 1, 3, None)]
TOKENS = 18 * PAGE


@dataclass
class Model:
    """What a session should hold. `dropped`: slots below it went with the window."""

    cache: SessionCache
    tags: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    parents: tuple[int, ...] = ()
    dropped: int = 0

    def settle(self, kept: list[int]) -> None:
        self.tags += [self.pending[row] for row in kept]
        self.pending, self.parents = [], ()
        self.dropped = max(self.dropped, (len(self.tags) - WINDOW + 1) // PAGE * PAGE)


def write(pool: KVPool, cache: SessionCache, first: int, tags: list[int]) -> None:
    for layer in range(len(LAYERS)):
        table = cache.tables[pool.group_of[layer]]
        for slot, tag in enumerate(tags, start=first):
            pool.keys[layer][table[slot // PAGE], slot % PAGE] = tag
            pool.values[layer][table[slot // PAGE], slot % PAGE] = -tag


def read(pool: KVPool, cache: SessionCache, layer: int, first: int, end: int) -> list[int]:
    """Tags of slots [first, end), found the way attention finds them: through the page table."""
    slots = torch.arange(first, end)
    pages = pool.page_table([cache], pool.group_of[layer])[0].long()[slots // PAGE]
    assert (pages >= 0).all(), "a visible row has no page"
    keys, values = pool.keys[layer][pages, slots % PAGE], pool.values[layer][pages, slots % PAGE]
    tags = keys[:, 0, 0]
    assert (keys == tags[:, None, None]).all()
    assert (values == -tags[:, None, None]).all()
    return tags.int().tolist()


class PoolMachine(RuleBasedStateMachine):
    """Random lives of a few sessions in a pool that is a little too small for them."""

    pool_type: type[KVPool] = KVPool

    @initialize()
    def start(self) -> None:
        self.pool = self.pool_type(LAYERS, TOKENS)
        self.sessions: list[Model] = []
        self.tag = 0

    def _pick(self, index: int) -> Model:
        return self.sessions[index % len(self.sessions)]

    def _append(self, session: Model, parents: tuple[int, ...]) -> bool:
        before = (session.cache.length, session.cache.pending, [list(table) for table in session.cache.tables])
        first = len(session.tags) + len(session.pending)
        try:
            self.pool.append(session.cache, len(parents))
        except PoolExhausted:
            assert before == (session.cache.length, session.cache.pending, session.cache.tables)
            assert self.pool.free_pages < (first + len(parents) - 1) // PAGE - first // PAGE + 1
            return False
        tags = list(range(self.tag + 1, self.tag + 1 + len(parents)))
        self.tag += len(parents)
        write(self.pool, session.cache, first, tags)
        session.pending, session.parents = session.pending + tags, parents
        return True

    def _commit(self, session: Model, rows: list[int]) -> None:
        try:
            self.pool.commit(session.cache, rows)
        except PoolExhausted:
            # The engine would end the session; here it may try again when there is room.
            return
        session.settle(rows)

    @precondition(lambda self: len(self.sessions) < 6)
    @rule()
    def open(self) -> None:
        self.sessions.append(Model(self.pool.open()))

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
        clone = self.pool.fork(parent.cache)
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
            self.pool.rewind(session.cache, length)
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
        self.pool.release(session.cache)

    @invariant()
    def every_visible_row_has_its_own_tag(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(session.cache for session in self.sessions)
        for session in self.sessions:
            rows = session.tags + session.pending
            assert (session.cache.length, session.cache.pending) == (len(session.tags), len(session.pending))
            for layer, spec in enumerate(LAYERS):
                first = max(0, len(session.tags) - spec.window + 1) if spec.window else 0
                assert read(self.pool, session.cache, layer, first, len(rows)) == rows[first:]

    def teardown(self) -> None:
        for session in getattr(self, "sessions", []):
            self.pool.release(session.cache)
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.pool.free_pages == self.pool.n_pages


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class NeverCopies(KVPool):
    """Writes into pages that a fork still reads."""

    def _make_writable(self, g: int, table: list[int], first: int, end: int) -> None:
        pass


class NeverGathers(KVPool):
    """Leaves accepted rows where the tree had them."""

    def _gather(self, cache: SessionCache, rows: object) -> None:
        pass


class DropsEarly(KVPool):
    """Lets go of one row that the window still shows."""

    def _trim(self, cache: SessionCache) -> None:
        for group in self.groups:
            group.window = group.window and group.window - 1
        super()._trim(cache)
        for group in self.groups:
            group.window = group.window and group.window + 1


class Leaks(KVPool):
    """Forgets to count a fork's pages."""

    def fork(self, cache: SessionCache) -> SessionCache:
        return SessionCache([list(table) for table in cache.tables], cache.length, cache.pending)


@pytest.mark.parametrize("broken", [NeverCopies, NeverGathers, DropsEarly, Leaks])
def test_the_machine_catches_a_broken_pool(broken: type[KVPool]) -> None:
    class Machine(PoolMachine):
        pool_type = broken

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


def _pool(pages: int) -> KVPool:
    return KVPool(LAYERS, pages * PAGE)


def test_an_append_that_fails_in_the_second_group_changes_nothing():
    pool = _pool(3)
    cache, other = pool.open(), pool.open()
    pool.append(other, PAGE)
    pool.groups[1].take()  # only the windowed group is short now
    with pytest.raises(PoolExhausted, match="2 pages of the KV pool are needed, 1 of 3 are free"):
        pool.append(cache, 2 * PAGE)
    assert cache == SessionCache([[], []])
    assert [len(group.free) for group in pool.groups] == [2, 1]
    pool.append(cache, PAGE)
    assert cache.pending == PAGE


def test_an_append_that_cannot_copy_a_shared_page_changes_nothing():
    pool = _pool(2)
    cache = pool.open()
    pool.append(cache, PAGE + 1)
    pool.commit(cache, range(PAGE + 1))
    clone = pool.fork(cache)
    with pytest.raises(PoolExhausted):
        pool.append(clone, 1)
    pool.check([cache, clone])
    pool.release(cache)
    pool.append(clone, 1)
    pool.check([clone])


def test_a_commit_that_cannot_copy_a_shared_page_changes_nothing():
    pool = _pool(1)
    cache = pool.open()
    pool.append(cache, 3)
    clone = pool.fork(cache)
    with pytest.raises(PoolExhausted):
        pool.commit(clone, [0, 2])
    pool.check([cache, clone])
    assert (clone.length, clone.pending) == (0, 3)
    pool.commit(clone, [0, 1])  # nothing moves, so no page is needed
    assert (clone.length, clone.pending) == (2, 0)


def test_a_window_gives_its_pages_back():
    pool = _pool(8)
    cache = pool.open()
    pool.append(cache, 5 * PAGE)
    pool.commit(cache, range(5 * PAGE))
    full, windowed = cache.tables
    assert DROPPED not in full
    assert windowed[:3] == [DROPPED] * 3  # slots 61 to 79 are in sight of row 80
    assert DROPPED not in windowed[3:]
    with pytest.raises(RewindRefused, match="rows in the window of 20 were dropped; replay the session"):
        pool.rewind(cache, 4 * PAGE)
    assert cache.length == 5 * PAGE
    pool.rewind(cache, 5 * PAGE - 10)
    pool.rewind(cache, 0)
    assert cache == SessionCache([[], []])
    assert pool.free_pages == 8


def test_the_page_table_is_padded():
    pool = _pool(8)
    long, short = pool.open(), pool.open()
    pool.append(long, PAGE + 1)
    pool.append(short, 1)
    table = pool.page_table([short, long], 0)
    assert table.dtype == torch.int32
    assert table.tolist() == [[short.tables[0][0], DROPPED], long.tables[0]]
    assert pool.page_table([pool.open()], 0).shape == (1, 0)


def test_a_forks_pages_outlive_its_parent():
    pool = _pool(4)
    parent = pool.open()
    pool.append(parent, 5)
    write(pool, parent, 0, [1, 2, 3, 4, 5])
    clone = pool.fork(parent)
    pool.release(parent)
    assert read(pool, clone, 0, 0, 5) == [1, 2, 3, 4, 5]
    pool.check([clone])
