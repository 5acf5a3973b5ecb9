import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from petal.protocol.wire import sampling
from petal.protocol.wire.sampling import SamplingError, SamplingParams, TokenCounts, candidates, draw, gumbel, uniforms
from petal.protocol.wire.tree import DraftTree, walk
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 10
LOGITS = np.array([1.5, 0.3, -0.7, 2.1, 0.0, -2.0, 1.1, 0.9, -0.1, -5.0])
PROMPT, OUTPUT = [0, 3, 3], [1, 6, 6]
PLAIN = SamplingParams(temperature=1.0)
PENALIZED = replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25)
# Beyond this many standard deviations chance is no explanation; the draws are fixed, so nothing flickers.
UNLIKELY = 4.0

PARAMS = [
    *(replace(PLAIN, temperature=t) for t in (0.5, 1.0, 2.0)),
    *(replace(PLAIN, temperature=t, top_k=4) for t in (0.5, 1.0, 2.0)),
    *(replace(PLAIN, temperature=t, top_p=0.8) for t in (0.5, 1.0, 2.0)),
    *(replace(PLAIN, temperature=t, min_p=0.1) for t in (0.5, 1.0, 2.0)),
    *(replace(PENALIZED, temperature=t) for t in (0.5, 1.0, 2.0)),
    replace(PENALIZED, temperature=1.5, top_k=7, top_p=0.9, min_p=0.05),
]


def expected_scores(logits, params, prompt=PROMPT, output=OUTPUT):
    """The rule written down a second time, token by token; -inf where a token cannot be drawn."""
    scores = [float(x) for x in logits]
    for token in set(prompt) | set(output):
        scores[token] = scores[token] * params.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    scores = [x / params.temperature for x in scores]
    if params.top_k:
        least = sorted(scores, reverse=True)[: params.top_k][-1]
        scores = [x if x >= least else -math.inf for x in scores]
    before = 0.0
    probabilities = softmax(scores)
    for token in sorted(range(len(scores)), key=lambda i: -probabilities[i]):
        if before >= params.top_p:
            scores[token] = -math.inf
        before += probabilities[token]
    probabilities = softmax(scores)
    return [
        x if p >= params.min_p * max(probabilities) else -math.inf for x, p in zip(scores, probabilities, strict=True)
    ]


def softmax(scores):
    values = np.exp(np.array(scores) - max(scores))
    return values / values.sum()


def chi_square(observed, probabilities):
    """How many standard deviations the counts are off (Wilson and Hilferty's cube root makes it a normal)."""
    observed, probabilities = np.ravel(observed), np.ravel(probabilities)
    possible = probabilities > 0
    assert not observed[~possible].any(), "a token was drawn that cannot be"
    expected = observed.sum() * probabilities[possible]
    freedom = possible.sum() - 1
    statistic = ((observed[possible] - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def histogram(params, positions=200, seeds=30):
    counts = TokenCounts(PROMPT, OUTPUT)
    result = np.zeros(VOCAB)
    for seed in range(seeds):
        seeded = replace(params, seed=seed * 0x1F3D5B79)
        for position in range(positions):
            result[draw(LOGITS, seeded, position, counts)] += 1
    return result


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_draws_follow_the_distribution(params):
    assert chi_square(histogram(params), softmax(expected_scores(LOGITS, params))) < UNLIKELY


def _without_token(seed, sequence, position, tokens):
    return gumbel(seed, sequence, position, np.zeros_like(tokens))


def _before_temperature(seed, sequence, position, tokens):
    return gumbel(seed, sequence, position, tokens) / 0.5


def _without_position(seed, sequence, position, tokens):
    return gumbel(seed, sequence, 0, tokens)


@pytest.mark.parametrize("broken", [_without_token, _before_temperature, _without_position])
def test_the_chi_square_sees_a_broken_rule(monkeypatch, broken):
    params = replace(PLAIN, temperature=0.5)
    expected = softmax(expected_scores(LOGITS, params))
    assert chi_square(histogram(params), expected) < UNLIKELY
    monkeypatch.setattr(sampling, "gumbel", broken)
    assert chi_square(histogram(params), expected) > 3 * UNLIKELY


# The same distribution as transformers.


def processed_scores(logits, params, counts):
    ids, scaled = candidates(sampling.processed(logits, params, counts, ()), params)
    scores = np.full(len(logits), -np.inf)
    scores[ids] = scaled
    return scores


def transformers_scores(logits, params, prompt):
    ids, scores = torch.tensor([prompt]), torch.tensor(logits)[None]
    processors = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    vocab=st.sampled_from([2, 10, 300, 3000]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 200, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.7]),
)
def test_the_same_candidates_as_transformers(seed, vocab, spread, temperature, top_k, top_p, min_p, penalty):
    random = np.random.default_rng(seed)
    logits = random.standard_normal(vocab) * spread
    prompt = random.integers(0, vocab, 7).tolist()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    ours = processed_scores(logits, params, TokenCounts(prompt))
    theirs = transformers_scores(logits, params, prompt)
    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    assert np.allclose(softmax(ours), softmax(theirs), atol=1e-12)
    if vocab <= 300:
        assert np.allclose(softmax(ours), softmax(expected_scores(logits, params, prompt, [])), atol=1e-12)


@given(st.integers(0, 999), st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 9), max_size=6))
def test_penalties(seed, prompt, output):
    logits = np.random.default_rng(seed).standard_normal(VOCAB)
    ours = processed_scores(logits, PENALIZED, TokenCounts(prompt, output))
    assert np.allclose(ours, expected_scores(logits, PENALIZED, prompt, output))


@given(st.lists(st.integers(0, 9), max_size=5), st.lists(st.integers(0, 9), max_size=5), st.integers(0, 9))
def test_a_tree_path_counts_as_output(output, path, position):
    along_tree = sampling.processed(LOGITS, PENALIZED, TokenCounts(PROMPT, output), path)
    along_chain = sampling.processed(LOGITS, PENALIZED, TokenCounts(PROMPT, [*output, *path]), ())
    assert np.array_equal(along_tree, along_chain)
    counts = TokenCounts(PROMPT, output)
    before = draw(LOGITS, PENALIZED, position, counts)
    assert draw(LOGITS, PENALIZED, position, counts, path) == draw(
        LOGITS, PENALIZED, position, TokenCounts(PROMPT, [*output, *path])
    )
    assert draw(LOGITS, PENALIZED, position, counts) == before, "a path left something behind"


# The noise.


def _hash_in_plain_integers(seed, sequence, position, token):
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    key = mix((seed + golden * (sequence + 1)) & mask)
    key = mix((key + golden * (position + 1)) & mask)
    return mix((key + golden * (token + 1)) & mask)


U64, U32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


@given(U64, U32, U32, st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
def test_the_noise_is_a_plain_integer_hash(seed, sequence, position, tokens):
    for dtype in (np.int64, np.uint32):
        got = uniforms(seed, sequence, position, np.array(tokens, dtype))
        hashes = [_hash_in_plain_integers(seed, sequence, position, token) for token in tokens]
        assert got.tolist() == [((h >> 12) + 0.5) * 2.0**-52 for h in hashes]
        assert ((got > 0) & (got < 1)).all()


@pytest.mark.parametrize(
    ("key", "h"),
    [
        ((0, 0, 0, 0), 0x238275BC38FCBE91),
        ((1, 2, 3, 4), 0x721ECF4652971CFC),
        ((42, 0, 100, 49151), 0x2AC85E601A8AE37D),
        ((18446744073709551615, 4294967295, 131071, 151935), 0xBFB4984358F61423),
    ],
)
def test_golden_values(key, h):
    # These may never change: every peer of a swarm must draw the same.
    assert _hash_in_plain_integers(*key) == h
    assert uniforms(*key[:3], np.array([key[3]]))[0] == ((h >> 12) + 0.5) * 2.0**-52


def test_the_extreme_noise_is_finite_and_bounded():
    extremes = np.array([0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52])
    noise = -np.log(-np.log(extremes))
    assert np.isfinite(noise).all()
    assert noise.max() <= sampling._MAX_NOISE


def _pairs(first, second):
    table = np.zeros((VOCAB, VOCAB))
    np.add.at(table, (first, second), 1)
    return table


def _draws(n=4000, *, seed=0, sequence=0, shift=0):
    params = replace(PLAIN, seed=seed, sequence=sequence)
    counts = TokenCounts()
    flat = np.zeros(VOCAB)
    return np.array([draw(flat, params, position + shift, counts) for position in range(n)])


@pytest.mark.parametrize(
    "other",
    [
        {"shift": 1},
        {"sequence": 1},
        {"sequence": 1, "shift": 1},
        {"seed": 1},
        {"seed": 1, "shift": 1},
        {"seed": 1 << 63},
        {"seed": 0x9E3779B97F4A7C15},
    ],
    ids=str,
)
def test_positions_sequences_and_seeds_are_independent(other):
    table = _pairs(_draws(), _draws(**other))
    assert chi_square(table, np.full((VOCAB, VOCAB), 1 / VOCAB**2)) < UNLIKELY


def test_the_independence_test_sees_dependence():
    same = _draws()
    assert chi_square(_pairs(same, same), np.full((VOCAB, VOCAB), 1 / VOCAB**2)) > 3 * UNLIKELY


# Drawing.


def test_greedy_takes_the_lowest_of_equal_ids():
    greedy = SamplingParams()
    assert draw(np.array([1.0, 3.0, 3.0, 3.0]), greedy, 5, TokenCounts()) == 1
    penalized = replace(greedy, presence_penalty=1.0)
    assert draw(np.array([2.0, 3.0, 2.0, 1.0]), penalized, 5, TokenCounts(output=[1])) == 0


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocab=st.sampled_from([1, 3, 50, 2000]),
    spread=st.sampled_from([0.0, 0.5, 5.0, 60.0, 1e4]),
    temperature=st.sampled_from([1e-4, 0.5, 1.0, 3.0, 100.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    forbidden=st.booleans(),
)
def test_only_tokens_that_can_win_are_left_out_of_nothing(seed, vocab, spread, temperature, dtype, forbidden):
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocab) * spread).round(1).astype(dtype)
    if forbidden and vocab > 1:
        logits[random.random(vocab) < 0.5] = -np.inf
        assume(np.isfinite(logits.max()))
    params = SamplingParams(temperature=temperature, seed=seed)
    everything = logits.astype(np.float64) / temperature + gumbel(seed, 0, 9, np.arange(vocab))
    assert draw(logits, params, 9, TokenCounts()) == int(everything.argmax())


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    vocab=st.sampled_from([5, 80, 5000]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    digits=st.sampled_from([0, 1, 9]),
    head=st.sampled_from([1, 4, 1024]),
    top_p=st.sampled_from([1e-6, 0.2, 0.9, 0.99, 0.999999]),
)
def test_the_fast_path_of_top_p_equals_the_full_sort(seed, vocab, spread, digits, head, top_p):
    scaled = (np.random.default_rng(seed).standard_normal(vocab) * spread).round(digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_LIKELIEST", head)
        fast = sampling._nucleus(scaled, top_p)
        patch.setattr(sampling, "_LIKELIEST", vocab)
        assert np.array_equal(fast, sampling._nucleus(scaled, top_p))
    assert len(fast) >= 1


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [math.inf, -math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("params", [SamplingParams(), PLAIN, replace(PLAIN, top_p=0.5, min_p=0.1)])
def test_useless_logits_are_refused(bad, params):
    with pytest.raises(SamplingError, match="not a number or infinite"):
        draw(np.array(bad), params, 0, TokenCounts())


def test_a_forbidden_token_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0])
    for params in (PLAIN, replace(PLAIN, top_k=3), replace(PLAIN, top_p=0.9), replace(PENALIZED, min_p=0.1)):
        drawn = {draw(logits, params, position, TokenCounts([0], [2])) for position in range(200)}
        assert drawn == {1, 3}


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -101.0, 101.0])
def test_parameters_out_of_range(name, value):
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"temperature": 1e-5},
        {"top_k": -1},
        {"top_k": 1 << 32},
        {"seed": -1},
        {"seed": 1 << 64},
        {"seed": 10**400},
        {"sequence": 1 << 32},
        {"frequency_penalty": math.nan},
        {"logit_bias": ((3, math.nan),)},
        {"logit_bias": ((3, 101.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": tuple((id, 1.0) for id in range(2000))},
    ],
    ids=str,
)
def test_more_parameters_out_of_range(bad):
    with pytest.raises(SamplingError, match=next(iter(bad))):
        SamplingParams(**bad)


# Two tokens through random trees.

SMALL = 4
FIRST = np.array([0.9, 0.1, -0.4, 0.3])
SECOND = np.array([[0.0, 1.0, -1.0, 0.5], [1.2, 0.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 0.3, 0.1]])


def _random_tree(random):
    rows = int(random.integers(1, 9))
    parents = [-1] + [int(random.integers(0, row)) for row in range(1, rows)]
    return DraftTree((0, *random.integers(0, SMALL, rows - 1).tolist()), tuple(parents))


def _drawn(logits, positions):
    """`draw` of PLAIN at many positions at once."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = mix(mix(np.array([golden])) + golden * (positions.astype(np.uint64) + np.uint64(1)))
    hashes = mix(key[:, None] + golden * np.arange(1, SMALL + 1, dtype=np.uint64))
    u = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    drawn = (logits - np.log(-np.log(u))).argmax(axis=1)
    assert drawn[:200].tolist() == [draw(logits, PLAIN, int(p), TokenCounts()) for p in positions[:200]]
    return drawn.tolist()


def _joint(n, redraw=False):
    """How often each pair of tokens is said, when random trees guide the way."""
    trees = [_random_tree(np.random.default_rng(seed)) for seed in range(64)]
    positions = 2 * np.arange(n)
    # By try: the first token, and the second behind each first one; then what a second chance would give.
    chances = [
        (_drawn(FIRST, positions + late), [_drawn(logits, positions + late + 1) for logits in SECOND])
        for late in (0, 1 << 30)
    ]
    table = np.zeros((SMALL, SMALL))
    for i in range(n):
        tree = trees[i % len(trees)]

        def draw_at(row, path, tree=tree, i=i):
            if len(path) == 2:
                return -1  # nobody's child: two tokens are enough
            tokens = [second[path[0]][i] if path else first[i] for first, second in chances]
            drafted = [tree.ids[child] for child in tree.children[row]]
            return tokens[1] if redraw and tokens[0] not in drafted else tokens[0]

        accepted, token = walk(tree, draw_at)
        said = [tree.ids[row] for row in accepted[1:]] + [token]
        if len(said) == 1:
            said.append(chances[0][1][token][i])
        table[said[0], said[1]] += 1
    return table


JOINT = softmax(FIRST)[:, None] * np.array([softmax(row) for row in SECOND])


def test_two_tokens_through_random_trees_have_the_models_joint_distribution():
    n = 100_000
    table = _joint(n)
    assert chi_square(table, JOINT) < UNLIKELY
    assert np.abs(table / n - JOINT).sum() / 2 < 0.01


def test_the_joint_sees_a_rule_that_prefers_what_was_drafted():
    assert chi_square(_joint(100_000, redraw=True), JOINT) > 3 * UNLIKELY
