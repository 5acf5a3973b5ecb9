import random
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from petal.protocol.wire.tree import DraftTree, RowTree, TreeError, chain, walk


@st.composite
def trees(draw: st.DrawFn, max_rows: int = 12, vocab: int = 4) -> DraftTree:
    rows = draw(st.integers(1, max_rows))
    parents = [-1] + [draw(st.integers(0, row - 1)) for row in range(1, rows)]
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows))
    return DraftTree(tuple(ids), tuple(parents))


@pytest.mark.parametrize(
    ("parents", "match"),
    [
        ([], "at least row 0"),
        ([0], "row 0 has parent 0, it must be -1"),
        ([-1, 1], "row 1 has parent 1, it must be from 0 to 0"),
        ([-1, -1], "row 1 has parent -1"),
        ([-1, 0, 5], "row 2 has parent 5, it must be from 0 to 1"),
        ([-1, 0, -2], "row 2 has parent -2"),
    ],
)
def test_what_is_no_tree_is_refused(parents, match):
    with pytest.raises(TreeError, match=match):
        RowTree(tuple(parents))
    with pytest.raises(TreeError, match=match):
        DraftTree((7,) * len(parents), tuple(parents))


def test_every_row_has_an_id():
    with pytest.raises(TreeError, match="2 ids but 1 parents"):
        DraftTree((1, 2), (-1,))


@given(st.lists(st.integers(-3, 6), max_size=6))
def test_the_check_agrees_with_the_definition(parents):
    is_tree = bool(parents) and all(p == -1 if row == 0 else p in range(row) for row, p in enumerate(parents))
    try:
        RowTree(tuple(parents))
    except TreeError:
        assert not is_tree
    else:
        assert is_tree


def test_a_chain():
    assert chain(4) == RowTree((-1, 0, 1, 2))
    assert chain(4) is chain(4)
    tree = DraftTree((5, 6, 7), chain(3).parents)
    assert len(tree) == 3
    assert tree.path(2) == [0, 1, 2]
    assert tree.children == [[1], [2], []]
    assert tree.depths == (0, 1, 2)
    assert tree.is_chain
    assert not RowTree((-1, 0, 0)).is_chain


@given(trees())
def test_paths_children_and_depths_agree(tree):
    for row in range(len(tree)):
        path = tree.path(row)
        assert path[0] == 0
        assert path[-1] == row
        assert all(tree.parents[child] == parent for parent, child in pairwise(path))
        assert tree.depths[row] == len(path) - 1
        assert tree.children[row] == [c for c in range(len(tree)) if tree.parents[c] == row]
        tree.check_path(path)


@given(trees(), st.lists(st.integers(-2, 13), max_size=5))
def test_a_commit_is_a_path_from_row_0(tree, rows):
    is_path = any(rows == tree.path(row) for row in range(len(tree)))
    try:
        tree.check_path(rows)
    except TreeError:
        assert not is_path
    else:
        assert is_path


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "starts with row 0"),
        ([1], "starts with row 0"),
        ([0, 2], None),
        ([0, 1, 3], None),
        ([0, 3], "row 3 is not a child of row 0"),
        ([0, 0], "row 0 is not a child of row 0"),
        ([0, 9], "row 9 is not a child"),
        ([0, -1], "row -1 is not a child"),
        ([0, 2, 1], "row 1 is not a child of row 2"),
    ],
)
def test_commits(rows, match):
    tree = RowTree((-1, 0, 0, 1))
    if match is None:
        tree.check_path(rows)
        return
    with pytest.raises(TreeError, match=match):
        tree.check_path(rows)


def _successor(path_ids: list[int], seed: int, vocab: int) -> int:
    """What the model says behind a path: any function of the ids alone."""
    return random.Random(f"{seed} {path_ids}").randrange(vocab)


@given(trees(), st.integers(0, 99))
def test_walk_accepts_the_longest_path_that_the_model_says_itself(tree, seed):
    # Of two equal siblings the walk follows the first, which may end sooner: exact all the same, but not the longest.
    assume(len({(parent, token) for parent, token in zip(tree.parents, tree.ids, strict=True)}) == len(tree))
    said: list[int] = []
    for _ in range(len(tree)):
        said.append(_successor(said, seed, 4))

    seen: list[tuple[int, list[int]]] = []

    def draw(row: int, path_ids: list[int]) -> int:
        seen.append((row, list(path_ids)))
        return _successor(path_ids, seed, 4)

    accepted, token = walk(tree, draw)
    spoken = {row: [tree.ids[r] for r in tree.path(row)[1:]] for row in range(len(tree))}
    depth = max(len(ids) for ids in spoken.values() if ids == said[: len(ids)])
    assert [tree.ids[row] for row in accepted[1:]] == said[:depth]
    assert token == said[depth]
    tree.check_path(accepted)
    assert seen == [(row, said[:d]) for d, row in enumerate(accepted)]


def test_walk_does_not_look_beside_the_first_of_equal_siblings():
    # Drafters send no equal siblings; if one does, the answer is still right, only shorter.
    tree = DraftTree((9, 1, 1, 2), (-1, 0, 0, 2))
    assert walk(tree, lambda row, path: len(path) + 1) == ([0, 1], 2)
