"""Drafting never changes a token: any drafter, budget, temperature and sampler against plain steps of the same seed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import petal.protocol.wire.verification
import pytest
import torch
from petal.client.drafting.drafter import Drafter, DrafterError, ScoredTree
from petal.client.drafting.model import ModelDrafter
from petal.client.drafting.ngram import NgramDrafter
from petal.client.drafting.registry import load_drafter
from petal.client.session.hop import Hop
from petal.client.swarm import AsyncSwarmModel
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.sampling import SamplingParams
from petal.protocol.wire.tree import DraftTree, walk

from ..support.reference import demo_checkpoint, prompt_ids
from ..support.swarms import local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama
from ..support.tiny_drafter import tiny_drafter

PROMPT = [5, 17, 90, 33, 2, 8]
BUDGETS = (0, 1, 8, 32, 128)
SAMPLING = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drafters(name: str) -> list[Drafter]:
    return {
        "ngram": [NgramDrafter()],
        "right": [tiny_drafter(0).fresh()],
        "wrong": [tiny_drafter(7).fresh()],
        "merged": [NgramDrafter(), tiny_drafter(0).fresh()],
    }[name]


async def said(client: AsyncSwarmModel, prompt: Sequence[int], **settings: object) -> tuple[list[int], int]:
    """The answer and the number of trips."""
    pieces = [piece async for piece in client.stream(list(prompt), **settings)]
    return [token for piece in pieces for token in piece.ids], len(pieces)


@pytest.fixture
async def exact() -> AsyncIterator[AsyncSwarmModel]:
    async with local_swarm(tiny_llama(), spans(4, 2), exact=True) as swarm, swarm.connect(exact=True) as client:
        yield client


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2, 3))])
async def test_every_drafter_budget_and_sampler_gives_the_plain_tokens(exact: AsyncSwarmModel, seed: int) -> None:
    trips: dict[str, int] = dict.fromkeys(("ngram", "right", "wrong", "merged"), 0)
    for i, sampling in enumerate(SAMPLING):
        common = {"max_new_tokens": 16, "eos_token_id": -1, "seed": seed, **sampling}
        plain, _ = await said(exact, PROMPT, drafter="none", **common)
        for name, budget in itertools.product(trips, BUDGETS if i < 3 else (8, 32)):
            drafted, rounds = await said(exact, PROMPT, drafter=drafters(name), budget=budget, **common)
            assert drafted == plain, (name, budget, sampling, seed)
            trips[name] += rounds if budget >= 8 else 0
    assert trips["right"] < 0.6 * trips["wrong"], "a drafter with the target's weights must save trips"
    assert trips["merged"] <= 1.05 * trips["right"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
async def test_the_real_pair_gives_the_plain_tokens(seed: int) -> None:
    """SmolLM2 in exact mode with the drafter that Petal has for it."""
    prompt = prompt_ids()["code-1"]
    async with local_swarm("demo", spans(30, 2), exact=True) as swarm, swarm.connect(exact=True) as client:
        for i, sampling in enumerate(SAMPLING):
            common = {"max_new_tokens": 24, "eos_token_id": -1, "seed": seed, **sampling}
            plain, _ = await said(client, prompt, drafter="none", **common)
            trips = {}
            for name, budget in itertools.product(("ngram", "model", "ngram,model"), BUDGETS if i < 3 else (8, 32)):
                drafted, trips[name, budget] = await said(client, prompt, drafter=name, budget=budget, **common)
                assert drafted == plain, (name, budget, sampling, seed)
            assert trips["model", 32] < 0.7 * len(plain), "the drafter must save trips"


async def test_a_tail_that_favours_drafted_tokens_is_caught(
    exact: AsyncSwarmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: accepting the first child whenever there is one is a rule that looks right and is not."""

    def eager(tree: DraftTree, draw) -> tuple[list[int], int]:
        accepted, token = walk(tree, draw)
        if len(accepted) == 1 and tree.children[0]:
            return [0, tree.children[0][0]], draw(tree.children[0][0], [tree.ids[tree.children[0][0]]])
        return accepted, token

    common = {"max_new_tokens": 24, "eos_token_id": -1, "temperature": 1.0}
    plain, _ = await said(exact, PROMPT, drafter="none", **common)
    monkeypatch.setattr(petal.protocol.wire.verification, "walk", eager)
    drafted, _ = await said(exact, PROMPT, drafter=drafters("wrong"), budget=8, **common)
    assert drafted != plain


async def test_the_controller_changes_speed_only(exact: AsyncSwarmModel) -> None:
    for sampling in SAMPLING:
        common = {"max_new_tokens": 40, "eos_token_id": -1, **sampling}
        plain, _ = await said(exact, PROMPT, drafter="none", **common)
        assert (await said(exact, PROMPT, drafter=drafters("merged"), **common))[0] == plain
        assert (await said(exact, PROMPT, **common))[0] == plain


async def test_end_of_text_inside_a_path(exact: AsyncSwarmModel) -> None:
    plain, _ = await said(exact, PROMPT, drafter="none", max_new_tokens=40, eos_token_id=-1)
    for at in (1, 4, 9, 17):
        end = plain[at]
        expected = plain[: plain.index(end) + 1]
        drafted, _ = await said(
            exact, PROMPT, drafter=drafters("right"), budget=32, max_new_tokens=40, eos_token_id=end
        )
        assert drafted == expected


async def test_the_context_ends_inside_a_tree(exact: AsyncSwarmModel) -> None:
    prompt = [(7 * i + i * i) % VOCAB for i in range(480)]
    common = {"max_new_tokens": 200, "eos_token_id": -1}
    plain, _ = await said(exact, prompt, drafter="none", **common)
    assert len(plain) == 512 - 480 + 1
    for name in ("right", "ngram"):
        assert (await said(exact, prompt, drafter=drafters(name), budget=128, **common))[0] == plain


async def test_a_token_limit_inside_a_path_and_going_on_after_it(exact: AsyncSwarmModel) -> None:
    """What lies behind the limit is forgotten: the same session goes on as if it had never been drafted."""
    plain, _ = await said(exact, PROMPT, drafter="none", max_new_tokens=30, eos_token_id=-1)
    for limit in (1, 2, 5, 13):
        drafted, _ = await said(
            exact, PROMPT, drafter=drafters("right"), budget=16, max_new_tokens=limit, eos_token_id=-1
        )
        assert drafted == plain[:limit]


class Foreseeing(Drafter):
    """Knows the answer, and counts how often it was asked to draft ahead."""

    heavy = True

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)
        self.ahead_calls = 0

    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        chain = self._text[len(ids) - 1 : len(ids) + budget]
        return ScoredTree(tuple(chain), tuple(range(-1, len(chain) - 1)), tuple(-0.01 * i for i in range(len(chain))))

    def ahead(self) -> bool:
        self.ahead_calls += 1
        return self.ahead_calls % 3 > 0


async def test_stop_strings_inside_a_path() -> None:
    prompt = prompt_ids()["chat-1"]
    async with local_swarm("demo", spans(30, 2)) as swarm, swarm.connect() as client:
        common = {"max_new_tokens": 24, "eos_token_id": -1}
        pieces = [p async for p in client.stream(prompt, drafter="none", **common)]
        text, ids = "".join(p.text for p in pieces), [t for p in pieces for t in p.ids]
        words = text.split()
        for stop in (f"{words[4]} {words[5]}", text[30:33]):
            plain = [p async for p in client.stream(prompt, drafter="none", stop_strings=stop, **common)]
            oracle = Foreseeing([*prompt, *ids])
            drafted = [p async for p in client.stream(prompt, drafter=oracle, budget=16, stop_strings=stop, **common)]
            assert "".join(p.text for p in drafted) == "".join(p.text for p in plain) == text[: text.index(stop)]
            assert drafted[-1].finish_reason == plain[-1].finish_reason == "stop_string"
            assert len(drafted) < len(plain)
            assert oracle.ahead_calls, "nothing was drafted while a tree was in flight"


# The draft model's own state.


def fresh_tree(drafter: ModelDrafter, ids: Sequence[int], budget: int, sampling: SamplingParams) -> ScoredTree:
    other = drafter.fresh()
    other.start(ids[:3], sampling)
    return other.propose(ids, budget)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_drafter_that_follows_the_text_equals_one_that_reads_it_anew(sampling: dict[str, float]) -> None:
    """Descending, branching off and going back leave no trace; ahead only adds."""
    params = SamplingParams(**sampling)
    drafter = tiny_drafter(7).fresh()
    rng = np.random.default_rng(0)
    ids = PROMPT[:]
    drafter.start(ids[:3], params)
    for turn in range(15):
        tree = drafter.propose(ids, 12)
        expected = fresh_tree(drafter, ids, 12, params)
        assert (tree.ids, tree.parents) == (expected.ids, expected.parents)
        assert np.allclose(tree.scores, expected.scores, atol=1e-3)
        for _ in range(turn % 4):
            drafter.ahead()
        row = int(rng.integers(0, len(tree)))
        ids = [*ids, *(tree.ids[r] for r in tree.path(row)[1:])]
        ids += [int(t) for t in rng.integers(0, VOCAB, turn % 3)] or [9]
        if turn % 7 == 6:
            ids = ids[: len(ids) // 2]


def test_a_drafter_encodes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = tiny_drafter(0).fresh()
    rows: list[int] = []
    forward = drafter._forward
    monkeypatch.setattr(drafter, "_forward", lambda ids, *rest: (rows.append(len(ids)), forward(ids, *rest))[1])
    ids = [*PROMPT * 40]
    drafter.start(ids, SamplingParams())
    tree = drafter.propose(ids, 8)
    assert sum(rows) <= len(ids) + 8
    rows.clear()
    path = max((tree.path(row) for row in range(len(tree))), key=len)
    drafter.propose([*ids, *(tree.ids[row] for row in path[1:-1])], 8)
    assert sum(rows) <= 8, "an accepted path was encoded again"


def test_what_is_kept_of_a_tree_is_what_a_fresh_drafter_finds() -> None:
    drafter = tiny_drafter(7).fresh()
    drafter.start(PROMPT, SamplingParams())
    ids, followed = PROMPT[:], 0
    for i in range(25):
        tree = drafter.propose(ids, 16)
        while drafter.ahead():
            pass
        ids = [*ids, tree.ids[1 + i % 3], *([] if i % 3 else [i])]
        drafter._follow(ids)
        tree = drafter._tree
        for node in np.flatnonzero(tree.expanded)[:8].tolist():
            followed += node > 0
            path = [*ids, *tree.tokens[drafter._path(node)].tolist()]
            assert children(drafter, node) == pytest.approx(children(fresh_at(path), 0))
    assert followed, "no tree outlived its round"


def children(drafter: ModelDrafter, node: int) -> dict[int, float]:
    """Scores of a node's children by token, seen from the node."""
    tree = drafter._tree
    found = np.flatnonzero(tree.parents == node)
    return dict(zip(tree.tokens[found].tolist(), (tree.scores[found] - tree.scores[node]).tolist(), strict=True))


def fresh_at(ids: list[int]) -> ModelDrafter:
    drafter = tiny_drafter(7).fresh()
    drafter.start(PROMPT, SamplingParams())
    drafter._follow(ids)
    return drafter


# Peers that take no trees, or small ones.


async def test_peers_without_trees_get_plain_steps() -> None:
    async with local_swarm(tiny_llama(), spans(4, 2)) as swarm:
        sessions = swarm.peers[1].service.sessions
        sessions.info = replace(sessions.info, features=sessions.info.features - {"tree"})
        async with swarm.connect() as client:
            plain, trips = await said(client, PROMPT, drafter="none", max_new_tokens=12, eos_token_id=-1)
            drafted, rounds = await said(
                client, PROMPT, drafter=drafters("right"), budget=8, max_new_tokens=12, eos_token_id=-1
            )
    assert drafted == plain
    assert rounds == trips


async def test_a_budget_over_the_limit_is_clipped_and_said(
    exact: AsyncSwarmModel, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"max_new_tokens": 12, "eos_token_id": -1}
    plain, _ = await said(exact, PROMPT, drafter="none", **common)
    with caplog.at_level(logging.WARNING):
        drafted, _ = await said(exact, PROMPT, drafter=drafters("ngram"), budget=10**6, **common)
    assert drafted == plain
    assert [r.message for r in caplog.records if "budget of 1000000" in r.message], "the user must hear of it"


# What crosses a link.


async def test_bytes_on_the_wire(exact: AsyncSwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of K nodes: at most 16 bytes a node + 200 to the head; at most 16 bytes an accepted token + 200 back."""
    sent: list[tuple[int, int]] = []
    back: list[tuple[int, int]] = []
    send, receive = Hop.send, Hop._receive

    async def noting_send(self: Hop, frame: pb.ClientFrame) -> None:
        if frame.HasField("step") and not frame.step.prefill:
            sent.append((len(frame.step.ids) - 1, frame.ByteSize()))
        await send(self, frame)

    def noting_receive(self: Hop, frame: pb.PeerFrame) -> None:
        if frame.HasField("result") and frame.result.accepted:
            back.append((len(frame.result.accepted), frame.ByteSize()))
        receive(self, frame)

    monkeypatch.setattr(Hop, "send", noting_send)
    monkeypatch.setattr(Hop, "_receive", noting_receive)
    for name in ("right", "wrong"):
        await said(exact, PROMPT, drafter=drafters(name), budget=64, max_new_tokens=24, eos_token_id=-1)
    assert max(nodes for nodes, _ in sent) == 64
    assert max(rows for rows, _ in back) >= 4
    assert all(size <= 16 * nodes + 200 for nodes, size in sent)
    assert all(size <= 16 * rows + 200 for rows, size in back)


# Drafters that cannot serve.


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizer = demo_checkpoint().tokenizer()
    with pytest.raises(DrafterError, match=r"brings no tokenizer"):
        load_drafter(str(tiny_llama()), tokenizer)
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_llama().iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.json").write_text(small_tokenizer())
    with pytest.raises(DrafterError, match=r"another vocabulary than the model"):
        load_drafter(str(other), tokenizer)


def small_tokenizer() -> str:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).to_str()


def test_a_file_that_is_no_drafter_is_refused(tmp_path: Path) -> None:
    tokenizer = demo_checkpoint().tokenizer()
    (tmp_path / "draft.gguf").write_bytes(b"GGUF but not really")
    for source in (tmp_path / "draft.gguf", tmp_path, tmp_path / "nothing"):
        with pytest.raises(DrafterError, match="no drafter in"):
            load_drafter(str(source), tokenizer)


async def test_names_that_do_not_fit(exact: AsyncSwarmModel) -> None:
    with pytest.raises(DrafterError, match=r"petal distill"):
        await said(exact, PROMPT, drafter="model", max_new_tokens=4)
    with pytest.raises(DrafterError, match=r"needs the model's tokenizer"):
        await said(exact, PROMPT, drafter="ngram,/no/such/file", max_new_tokens=4)
