"""Growing, merging and scoring of draft trees, and drafts from the text itself: no model, no sockets."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.client.drafting.candidates import score_children
from petal.client.drafting.drafter import ScoredTree, merge
from petal.client.drafting.ngram import NgramDrafter, SuffixAutomaton
from petal.client.drafting.tree_builder import DECAY, MAX_DEPTH, TreeBuilder
from petal.protocol.wire.sampling import SamplingParams, TokenCounts, draw

VOCAB = 6


class Toy:
    """A language model over a few tokens: the next token's log-probabilities are a function of the path."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def logprobs(self, path: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([self._seed, *(token + 1 for token in path)]).normal(0, 2, VOCAB)
        return logits - np.log(np.exp(logits).sum())


def grow(toy: Toy, tree: TreeBuilder, prefix: tuple[int, ...], budget: int, beams: int) -> None:
    """What a drafter does, without a model's cost."""
    while len(nodes := tree.frontier(budget, beams)):
        paths = [tuple(tree.tokens[[*tree.ancestors(n)[1:], n]].tolist()) if n else () for n in nodes.tolist()]
        logprobs = np.array([toy.logprobs(prefix + path) for path in paths])
        tokens = np.tile(np.arange(VOCAB), (len(nodes), 1))
        tree.expand(nodes, tokens, logprobs)


def paths_of(tree: ScoredTree) -> dict[tuple[int, ...], float]:
    return {tuple(tree.ids[r] for r in tree.path(row)[1:]): tree.scores[row] for row in range(1, len(tree))}


def best_by_force(toy: Toy, budget: int, depth: int) -> list[float]:
    """Scores of the best paths, every path enumerated."""
    level, scores = {(): 0.0}, []
    for _ in range(depth):
        level = {
            (*path, token): score + DECAY + float(value)
            for path, score in level.items()
            for token, value in enumerate(toy.logprobs(path))
        }
        scores += level.values()
    return sorted(scores, reverse=True)[:budget]


@pytest.mark.parametrize("beams", [1, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_growth_finds_the_best_paths_of_all(seed: int, beams: int) -> None:
    toy, tree = Toy(seed), TreeBuilder(0)
    grow(toy, tree, (), 12, beams)
    best = tree.best(12)
    assert np.allclose(sorted(best.scores[1:], reverse=True), best_by_force(toy, 12, 5))
    assert list(best.scores) == sorted(best.scores, reverse=True)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_budget_cuts_a_tree_that_keeps_ancestors(seed: int, budget: int, beams: int) -> None:
    tree = TreeBuilder(3)
    grow(Toy(seed), tree, (), budget, beams)
    best = tree.best(budget)
    assert len(best) == budget + 1
    assert best.ids[0] == 3
    for row in range(1, len(best)):
        assert best.scores[row] < best.scores[best.parents[row]]
    assert len(paths_of(best)) == budget, "two rows say the same path"
    assert max(len(best.path(row)) for row in range(len(best))) <= MAX_DEPTH + 1


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(0, 29))
@settings(max_examples=60, deadline=None)
def test_a_tree_rerooted_and_grown_equals_a_fresh_one(seed: int, budget: int, which: int) -> None:
    toy, tree = Toy(seed), TreeBuilder(0)
    grow(toy, tree, (), budget, 4)
    expanded = [i for i in np.flatnonzero(tree.expanded).tolist() if i]
    if not expanded:
        return
    node = expanded[which % len(expanded)]
    prefix = tuple(tree.tokens[[*tree.ancestors(node)[1:], node]].tolist())
    kept = tree.reroot(node)
    assert kept[0] == node
    assert tree.parents[0] == -1
    assert tree.depths[0] == 0
    fresh = TreeBuilder(prefix[-1])
    for grown in (tree, fresh):
        grow(toy, grown, prefix, budget, 4)
    assert paths_of(tree.best(budget)) == pytest.approx(paths_of(fresh.best(budget)))


def test_a_budget_of_nothing_is_the_root_alone() -> None:
    tree = TreeBuilder(7)
    assert len(tree.frontier(0, 8)) == 0
    assert tree.best(0) == ScoredTree((7,), (-1,), (0.0,))


def test_merge_is_the_union_with_the_best_scores() -> None:
    left = ScoredTree((9, 1, 2, 3), (-1, 0, 1, 0), (0.0, -0.5, -1.5, -2.0))
    right = ScoredTree((9, 1, 4, 2), (-1, 0, 0, 1), (0.0, -0.7, -0.9, -1.0))
    assert paths_of(merge([left, right], 10)) == {(1,): -0.5, (4,): -0.9, (1, 2): -1.0, (3,): -2.0}
    assert paths_of(merge([left, right], 2)) == {(1,): -0.5, (4,): -0.9}
    assert merge([left], 3) == left
    assert len(merge([left, right], 0)) == 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_merged_trees_keep_ancestors_and_order(seeds: list[int], budget: int) -> None:
    trees = []
    for seed in seeds:
        tree = TreeBuilder(0)
        grow(Toy(seed), tree, (), 15, 3)
        trees.append(tree.best(15))
    merged = merge(trees, budget)
    assert len(merged) <= budget + 1
    assert list(merged.scores) == sorted(merged.scores, reverse=True)
    assert set(paths_of(merged)) <= set().union(*(paths_of(tree) for tree in trees))


# Scores of children.


def test_scores_at_temperature_zero_are_the_drafts_own() -> None:
    logits = np.array([[3.0, 1.0, 0.5]])
    tokens, logprobs = score_children(np.array([[7, 2, 5]]), logits, np.array([4]), SamplingParams(), 2)
    assert tokens.tolist() == [[7, 2]]
    assert np.allclose(logprobs, (logits - np.log(np.exp(logits).sum()))[:, :2])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 0.9, "min_p": 0.1},
    ],
)
def test_the_first_child_is_what_a_target_with_these_logits_draws(params: dict[str, float]) -> None:
    """Shared noise: a perfect drafter is always right. With other noise it is not, or the test would show nothing."""
    rng = np.random.default_rng(0)
    rows, agreed, agreed_without = 300, 0, 0
    for position in range(rows):
        logits = rng.normal(0, 2, 20)
        order = np.argsort(-logits)
        sampling = SamplingParams(seed=5, **params)
        said = draw(logits, sampling, position, TokenCounts())
        for seed in (5, 6):
            drafting = SamplingParams(seed=seed, **params)
            tokens, _ = score_children(order[None], logits[order][None], np.array([position]), drafting, 4)
            agreed += tokens[0, 0] == said if seed == 5 else 0
            agreed_without += tokens[0, 0] == said if seed == 6 else 0
    assert agreed == rows
    assert agreed_without < 0.9 * rows


# The text's own n-grams.


@given(st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_automaton_finds_the_longest_earlier_suffix(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.touch()
        automaton.add(token)
    found = automaton.matches(4)
    lengths = [n for n in range(1, len(text)) if _earlier(text, text[-n:])]
    assert (found[0][0] if found else 0) == max(lengths, default=0)
    for length, end in found:
        assert end < len(text)
        assert text[end - length : end] == text[-length:]


def _earlier(text: list[int], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part)))


def test_ngrams_follow_the_latest_occurrence() -> None:
    drafter = NgramDrafter()
    tree = drafter.propose([1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 8, 1, 2, 3], 6)
    assert (5,) in paths_of(tree)
    assert (5, 8, 1) in paths_of(tree)
    assert len(drafter.propose([1, 2, 3], 6)) == 1, "nothing was said twice"
    assert len(drafter.propose([1, 2, 3, 1], 0)) == 1


def test_ngrams_learn_whom_to_trust() -> None:
    """In a text that repeats itself long matches earn trust; where they always fail they lose it."""
    steady, fooled = NgramDrafter(), NgramDrafter()
    steady.propose([1, 2, 3, 4, 5] * 20, 4)
    rng = random.Random(0)
    fooled.propose([token for _ in range(60) for token in (1, 2, 3, rng.randrange(4, 500))] + [1, 2, 3], 4)
    sure = steady.propose([1, 2, 3, 4, 5] * 20, 4).scores[1]
    unsure = fooled.propose(fooled._text.ids, 4).scores[1]
    assert math.exp(sure) > 0.9
    assert math.exp(unsure) < 0.4


def test_a_text_that_changes_its_past_starts_afresh() -> None:
    drafter = NgramDrafter()
    drafter.propose([1, 2, 3, 1, 2], 4)
    assert paths_of(drafter.propose([1, 2, 7, 1, 2], 4)).keys() == {(7,), (7, 1), (7, 1, 2)}


def test_a_repetitive_text_costs_linear_time() -> None:
    drafter = NgramDrafter()
    drafter.propose([5] * 20_000, 8)
    assert len(drafter._text._states) <= 2 * 20_000
