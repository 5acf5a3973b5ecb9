import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.protocol.wire.sampling import SamplingError, SamplingParams, TokenCounts, draw
from petal.protocol.wire.tree import DraftTree
from petal.protocol.wire.verification import TokenHistory, draw_after_prefill, verify

VOCAB = 12
PROMPT = [3, 1, 4, 1, 5]
GREEDY = SamplingParams()
PARAMS = [
    GREEDY,
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, seed=5),
    SamplingParams(temperature=1.3, top_k=6, top_p=0.9, repetition_penalty=0.8, frequency_penalty=0.7, seed=3),
]


def model(ids):
    """Logits behind a text: any function of all its ids."""
    return np.random.default_rng([len(ids), *ids]).standard_normal(VOCAB).astype(np.float32)


def plain_chain(params, n):
    """What a model says, token by token, without any tree."""
    said = []
    for _ in range(n):
        text = PROMPT + said
        said.append(draw(model(text), params, len(text), TokenCounts(PROMPT, said)))
    return said


def draft(said, row0, rng):
    """A random tree behind the emitted token; some of its rows are what the model will say."""
    ids, parents, depths = [row0], [-1], [0]
    for row in range(1, rng.randrange(1, 14)):
        parents.append(rng.randrange(row))
        depths.append(depths[parents[-1]] + 1)
        truth = said[depths[-1] - 1] if depths[-1] <= len(said) else 0
        ids.append(truth if rng.random() < 0.7 else rng.randrange(VOCAB))
    return DraftTree(tuple(ids), tuple(parents))


@pytest.mark.parametrize("params", PARAMS, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_trees_say_what_the_plain_chain_says(params, seed):
    rng = random.Random(seed)
    expected = plain_chain(params, 12)
    history = TokenHistory(list(PROMPT), len(PROMPT))
    verdict = draw_after_prefill(model(PROMPT), params, history)
    assert verdict.accepted == []
    said = [verdict.next_token]
    while len(said) < len(expected):
        tree = draft(expected[len(said) :], said[-1], rng)
        cached = list(history.ids)
        logits = np.stack([model(cached + [tree.ids[r] for r in tree.path(row)]) for row in range(len(tree))])
        verdict = verify(tree, logits, params, history, base=len(cached), top_logprobs=2)
        assert len(verdict.logprobs) == len(verdict.accepted)
        history.ids.extend(tree.ids[row] for row in verdict.accepted)
        said += [*(tree.ids[row] for row in verdict.accepted[1:]), verdict.next_token]
    assert said[: len(expected)] == expected


def test_the_chain_test_sees_history_that_is_lost():
    params = PARAMS[1]
    counted = TokenHistory([*PROMPT, 7, 7], len(PROMPT))
    lost = TokenHistory([*PROMPT, 7, 7], len(PROMPT) + 2)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7], logits[0, 0] = 2.0, 1.0
    tree = DraftTree((2,), (-1,))
    assert verify(tree, logits, params, counted, 7).next_token == 0
    assert verify(tree, logits, params, lost, 7).next_token == 7


def test_row_0_counts_as_output():
    params = SamplingParams(presence_penalty=1.0)
    logits = np.array([[0.0, 2.0, 1.5]], np.float32)
    assert verify(DraftTree((1,), (-1,)), logits, params, TokenHistory(), 0).next_token == 2
    assert verify(DraftTree((0,), (-1,)), logits, params, TokenHistory(), 0).next_token == 1


def test_the_tail_draws_at_depths_not_at_rows():
    params = SamplingParams(temperature=1.0, seed=9)
    logits = np.zeros((4, 1000), np.float32)
    first, second = (draw(logits[0], params, position, TokenCounts()) for position in (8, 9))
    tree = DraftTree((0, 999, 998, first), (-1, 0, 1, 0))
    verdict = verify(tree, logits, params, TokenHistory(), base=7)
    assert (verdict.accepted, verdict.next_token) == ([0, 3], second)


def test_log_probabilities_are_the_models_own():
    logits = np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, -np.inf, 3.0]], np.float32)
    # Penalties do not change what is reported.
    params = SamplingParams(presence_penalty=-1.0)
    verdict = verify(DraftTree((0, 1), (-1, 0)), logits, params, TokenHistory(), 0, top_logprobs=3)
    assert verdict.accepted == [0, 1]
    assert verdict.next_token == 3
    first, second = verdict.logprobs
    total = np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert first.chosen == pytest.approx(3 - total)
    assert [token for token, _ in first.top] == [1, 3, 2]
    assert [value for _, value in first.top] == pytest.approx([3 - total, 3 - total, 2 - total])
    assert second.chosen == pytest.approx(3 - np.log(2 + np.exp(3)))
    assert second.top[0][0] == 3


def test_log_probabilities_only_where_asked_and_no_more_than_there_are():
    logits = np.zeros((1, 3), np.float32)
    tree = DraftTree((0,), (-1,))
    assert verify(tree, logits, GREEDY, TokenHistory(), 0).logprobs == []
    (only,) = verify(tree, logits, GREEDY, TokenHistory(), 0, top_logprobs=50).logprobs
    assert [token for token, _ in only.top] == [0, 1, 2]
    assert np.exp([value for _, value in only.top]).sum() == pytest.approx(1)
    (after,) = draw_after_prefill(logits[0], GREEDY, TokenHistory([1], 1), top_logprobs=1).logprobs
    assert after.chosen == pytest.approx(-np.log(3))


def test_useless_logits_are_an_error():
    with pytest.raises(SamplingError):
        verify(DraftTree((0,), (-1,)), np.full((1, 3), np.nan, np.float32), GREEDY, TokenHistory(), 0)


def test_history():
    history = TokenHistory([1, 2, 3, 4], 3)
    clone = history.fork()
    clone.ids.append(9)
    history.truncate(2)
    assert (history.ids, history.prompt_length) == ([1, 2], 2)
    assert (clone.ids, clone.prompt_length) == ([1, 2, 3, 4, 9], 3)
    clone.truncate(4)
    assert (clone.ids, clone.prompt_length) == ([1, 2, 3, 4], 3)
