"""What drafted text is distributed like: exactly as the target alone says it, and not so under rules that look right.

A small target and a drafter that is off by quite a lot, over a few tokens, so that every text can be enumerated.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from petal.client.drafting.candidates import score_children
from petal.client.drafting.tree_builder import TreeBuilder
from petal.protocol.wire.sampling import SamplingParams, TokenCounts, draw
from petal.protocol.wire.tree import walk

V = 4
UNLIKELY = 1e-6
PARAMS = SamplingParams(temperature=1.0, seed=3)


@functools.cache
def target(path: tuple[int, ...]) -> np.ndarray:
    """Logits of the target behind a path."""
    return np.random.default_rng([1, *(t + 1 for t in path)]).normal(0, 1.2, V)


@functools.cache
def draft(path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits of the drafter behind a path, best first."""
    logits = target(path) + np.random.default_rng([2, *(t + 1 for t in path)]).normal(0, 1.0, V)
    order = np.argsort(-logits)
    return order, logits[order]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def joint(length: int) -> np.ndarray:
    """The target's own distribution over texts of `length` tokens."""
    table = np.ones((V,) * length)
    for path in itertools.product(range(V), repeat=length):
        for depth, token in enumerate(path):
            table[path] *= softmax(target(path[:depth]))[token]
    return table


def p_value(table: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's chi-square, by Wilson and Hilferty's approximation."""
    n, freedom = table.sum(), expected.size - 1
    chi = ((table - n * expected) ** 2 / (n * expected)).sum()
    z = ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def grown(position: int, budget: int):
    """A tree at this position, as the model drafter grows it; the noise is the target's."""
    tree = TreeBuilder(0)
    while len(nodes := tree.frontier(budget, 3)):
        paths = [tuple(tree.tokens[[*tree.ancestors(n)[1:], n]].tolist()) if n else () for n in nodes.tolist()]
        ids, logits = (np.stack(part) for part in zip(*map(draft, paths), strict=True))
        positions = position + tree.depths[nodes]
        tree.expand(nodes, *score_children(ids, logits, positions, PARAMS, 3))
        if tree.depths.max() > 2:
            break
    return tree.best(budget)


def say(tries: int, length: int, budget: int) -> tuple[np.ndarray, float]:
    """How often each text of `length` tokens is said over many positions, and accepted drafted tokens a try."""
    table, accepted_tokens = np.zeros((V,) * length), 0
    for i in range(tries):
        start, said = i * length, ()
        while len(said) < length:

            def draw_at(row: int, path: list[int], said=said, start=start) -> int:
                text = (*said, *path)
                if len(text) >= length:
                    return -1
                return draw(target(text), PARAMS, start + len(text), TokenCounts())

            # Behind the first tokens the tree is a new one, of the text so far.
            tree = grown(start, budget) if not said else None
            if tree is None:
                said = (*said, draw_at(0, []))
                continue
            accepted, token = walk(tree, draw_at)
            accepted_tokens += len(accepted) - 1
            said = (*said, *(tree.ids[row] for row in accepted[1:]), *([token] if token >= 0 else []))
        table[said] += 1
    return table, accepted_tokens / tries


@pytest.mark.parametrize(
    ("tries", "length"),
    [(5_000, 2), *(pytest.param(100_000, n, marks=(pytest.mark.full, pytest.mark.timeout(600))) for n in (2, 3))],
)
def test_drafted_text_has_the_targets_distribution(tries: int, length: int) -> None:
    table, accepted = say(tries, length, budget=5)
    expected = joint(length)
    assert accepted > 0.8, "the drafts were hardly accepted: the test shows nothing"
    assert p_value(table, expected) > UNLIKELY
    assert np.abs(table / tries - expected).sum() / 2 < 2 * np.sqrt(expected.size / tries)


# Rejection sampling without replacement (arXiv 2402.14160), right and wrong.


def rejection(rng: np.random.Generator, sampled: bool, residual: bool, candidates: int = 2) -> int:
    """One token. `sampled`: candidates are drawn without replacement, not the likeliest ones. `residual`: what is left
    after rejections is drawn from the residual, not from the target itself."""
    p = softmax(target(()))
    ids, logits = draft(())
    q = np.zeros(V)
    q[ids] = softmax(logits)
    whole = p.copy()
    drafted = np.argsort(-(np.log(q) + rng.gumbel(size=V)))[:candidates] if sampled else ids[:candidates]
    for token in drafted:
        if rng.random() * q[token] < p[token]:
            return int(token)
        p = np.maximum(p - q, 0)
        p /= p.sum()
        q[token] = 0
        q /= q.sum()
    return int(rng.choice(V, p=p if residual else whole))


@pytest.mark.parametrize(
    ("sampled", "residual", "right"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_the_measure_tells_right_rules_from_wrong_ones(sampled: bool, residual: bool, right: bool) -> None:
    """Both rules that look right and are not must fail at this size."""
    rng = np.random.default_rng(0)
    table = np.bincount([rejection(rng, sampled, residual) for _ in range(30_000)], minlength=V)
    assert (p_value(table, softmax(target(()))) > UNLIKELY) == right
