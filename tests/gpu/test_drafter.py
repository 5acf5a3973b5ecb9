"""A draft model on a card: it guesses what it guesses on a CPU, level by level through captured graphs."""

from __future__ import annotations

import functools
import gc
import time

import pytest
import torch
from petal.client.drafting.model import DraftModel, ModelDrafter
from petal.client.drafting.tree_cache import TreeCache
from petal.kernels.registry import backend_for
from petal.peer.model import WeightPrecision, load_span
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.sampling import SamplingParams

from tests.gpu.served import DRAFTER, PROMPTS

pytestmark = pytest.mark.cuda

BUDGET = 48


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@functools.cache
def model(device: str) -> DraftModel:
    with open_checkpoint(str(DRAFTER)) as checkpoint:
        weights = WeightPrecision(torch.bfloat16)
        span = load_span(checkpoint, 0, checkpoint.n_blocks, precision=weights, backend=backend_for(device))
        return DraftModel(checkpoint.name, span, span.vocab_size, checkpoint.draft_vocabulary())


def nodes(drafter: ModelDrafter, ids: list[int], params: SamplingParams) -> set[tuple[int, ...]]:
    """The tree's nodes, each by the tokens down to it."""
    drafter.start(ids, params)
    tree = drafter.propose(ids, BUDGET)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.ids, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, seed=5)], ids=["greedy", "drawn"])
def test_trees_are_those_of_the_cpu(params: SamplingParams) -> None:
    shares = []
    for ids in PROMPTS:
        there, here = (nodes(ModelDrafter(model(device)), ids, params) for device in ("cuda", "cpu"))
        shares.append(len(there & here) / len(here))
    assert sum(shares) / len(shares) > 0.7, shares


def test_the_text_goes_on_below_the_tree() -> None:
    """What was foreseen is kept; what follows is what a fresh drafter says of the longer text."""
    drafter = ModelDrafter(model("cuda"))
    drafter.start(PROMPTS[0], SamplingParams())
    tree = drafter.propose(PROMPTS[0], BUDGET)
    longer = [*PROMPTS[0], tree.ids[1]]
    fresh = ModelDrafter(model("cuda"))
    fresh.start(longer, SamplingParams())
    assert set(fresh.propose(longer, BUDGET).ids) == set(drafter.propose(longer, BUDGET).ids)


def test_the_next_sequence_replays_what_was_captured() -> None:
    made = model("cuda")
    gc.collect()
    first = ModelDrafter(made)
    first.start(PROMPTS[1], SamplingParams())
    first.propose(PROMPTS[1], BUDGET)
    cache: TreeCache = first._cache
    captured = dict(cache._runner._graphs)  # type: ignore[attr-defined]
    assert captured
    del first
    gc.collect()
    second = ModelDrafter(made)
    assert second._cache is cache
    second.start(PROMPTS[1], SamplingParams())
    started = time.perf_counter()
    second.propose(PROMPTS[1], BUDGET)
    print(
        f"a tree of {BUDGET} in {(time.perf_counter() - started) * 1e3:.1f} ms, a level {second.level_s * 1e3:.2f} ms"
    )
    assert cache._runner._graphs == captured  # type: ignore[attr-defined]
