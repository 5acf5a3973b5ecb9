"""Beam search over forks, and the scores of any generation: tokens and numbers are those of transformers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from petal.client.arguments import SettingsError
from petal.client.session.peer_error import PeerError
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from petal.peer.server import PeerServer
from transformers import AutoModelForCausalLM

from ..support.disturbed import crash
from ..support.reference import PROMPTS, demo_checkpoint, demo_reference, prompt_ids
from ..support.swarms import LocalSwarm, local_swarm, spans
from ..support.tiny import tiny_llama
from ..support.wire import released

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [5, 17, 90, 33, 2, 8]
PAD = 3
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
SCORED: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    async with local_swarm(tiny_llama(), spans(4, 3)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def model(swarm: LocalSwarm) -> AsyncIterator[AsyncSwarmModel]:
    async with swarm.connect() as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_leaks(swarm: LocalSwarm) -> AsyncIterator[None]:
    yield
    for peer in swarm.peers:
        await released(peer)
        assert peer.service.sessions.replay_budget.used == 0


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama())


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """All forks that clients ask for."""
    asked: list[Session] = []
    fork = Session.fork

    async def note(session: Session) -> Session:
        asked.append(session)
        return await fork(session)

    monkeypatch.setattr(Session, "fork", note)
    return asked


def expected(model: Any, prompts: list[list[int]], **settings: Any) -> Any:
    with torch.inference_mode():
        return model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            pad_token_id=PAD, **{"do_sample": False, **SCORED, **settings},
        )  # fmt: skip


def check(found: Any, wanted: Any) -> None:
    """Every token and every number; those of steps that nothing was computed for are NaN."""
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(found[name]) == len(wanted[name])
        for mine, other in zip(found[name], wanted[name], strict=True):
            assert mine.shape == other.shape
            known = ~mine.isnan()
            assert known.any()
            np.testing.assert_allclose(mine[known], other[known], atol=2e-3, rtol=1e-4)
    if getattr(wanted, "sequences_scores", None) is not None:
        np.testing.assert_allclose(found.sequences_scores, wanted.sequences_scores, atol=1e-4)
        assert found.beam_indices.tolist() == wanted.beam_indices.tolist()


def common_token(theirs: Any, place: int) -> int:
    """What greedy text says there: as an end of text it makes answers of many lengths."""
    found = expected(theirs, [PROMPT], max_new_tokens=12, eos_token_id=None, num_beams=3)
    return int(found.sequences[0, len(PROMPT) + place])


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("num_beams", "returned", "length_penalty"), [(2, 1, 1.0), (4, 4, 0.6), (5, 3, 2.0)])
async def test_beams_are_those_of_transformers(
    model: AsyncSwarmModel, theirs: Any, forks: list[Session], num_beams: int, returned: int, length_penalty: float,
    early_stopping: Any,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {
        "num_beams": num_beams, "num_return_sequences": returned, "length_penalty": length_penalty,
        "early_stopping": early_stopping, "max_new_tokens": 12, "eos_token_id": common_token(theirs, 4),
    }  # fmt: skip
    wanted = expected(theirs, [PROMPT], **settings)
    found = await model.generate(torch.tensor([PROMPT]), pad_token_id=PAD, **SCORED, **settings)
    check(found, wanted)
    assert forks
    plain = await model.generate(PROMPT, pad_token_id=PAD, **settings)
    answers = [[id for id in row if id != PAD] for row in wanted.sequences.tolist()]
    assert plain == (answers if returned > 1 else answers[0])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def demo() -> AsyncIterator[AsyncSwarmModel]:
    """A client of the demo model at one peer."""
    async with local_swarm("demo", [range(30)]) as swarm, swarm.connect() as client:
        yield client


async def check_demo(client: AsyncSwarmModel, prompt: list[int], num_beams: int, tokens: int) -> None:
    settings: dict[str, Any] = {"num_beams": num_beams, "num_return_sequences": 2, "max_new_tokens": tokens}
    ends = {"eos_token_id": sorted(demo_checkpoint().tokenizer().eos_ids)}
    wanted = expected(demo_reference(), [prompt], early_stopping=True, **settings, **ends)
    found = await client.generate(torch.tensor([prompt]), pad_token_id=PAD, early_stopping=True, **SCORED, **settings)
    check(found, wanted)


async def test_the_demo_model(demo: AsyncSwarmModel) -> None:
    await check_demo(demo, demo_checkpoint().tokenizer().encode("The capital of France is"), num_beams=4, tokens=10)


@pytest.mark.full  # its quick twins: the demo model at one peer, tiny models at three
async def test_the_demo_model_at_three_peers() -> None:
    async with local_swarm("demo", spans(30, 3)) as swarm, swarm.connect() as client:
        await check_demo(client, prompt_ids()[PROMPTS[0]["id"]], num_beams=3, tokens=8)


@pytest.mark.full
@pytest.mark.parametrize("num_beams", [2, 6])
async def test_the_demo_model_at_length(demo: AsyncSwarmModel, num_beams: int) -> None:
    for prompt in PROMPTS[:4]:
        await check_demo(demo, prompt_ids()[prompt["id"]], num_beams, tokens=40)


async def test_text_of_beams_ends_at_stop_strings(demo: AsyncSwarmModel) -> None:
    prompt, tokenizer = "Count: one, two, three,", demo_checkpoint().tokenizer()
    settings: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 10}
    free = await demo.generate(prompt, **settings)
    word = free[0].split()[1]
    assert not any(word in text for text in await demo.generate(prompt, stop_strings=word, **settings))
    ids = tokenizer.encode(prompt)
    for row in await demo.generate(ids, stop_strings=[word], **settings):
        # As with transformers, ids go on to the one that completes the string.
        assert word in tokenizer.decode(row[len(ids) :]) or len(row) == len(ids) + 10
        assert word not in tokenizer.decode(row[len(ids) : -1])


async def test_a_batch_of_prompts(model: AsyncSwarmModel, theirs: Any) -> None:
    prompts = [PROMPT, [9, 8, 7, 6, 5, 4], [5, 17, 90, 33, 2, 9]]
    settings: dict[str, Any] = {
        "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "eos_token_id": common_token(theirs, 3)
    }  # fmt: skip
    heard: list[tuple[int, int]] = []
    found = await model.generate(
        torch.tensor(prompts), pad_token_id=PAD, progress=lambda *done: heard.append(done), **SCORED, **settings
    )
    check(found, expected(theirs, prompts, **settings))
    assert heard == [(2, 6), (4, 6), (6, 6)]


RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3}, {"min_new_tokens": 9}, {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
    {"suppress_tokens": [7, 200, 11]},
    {"renormalize_logits": True, "bad_words_ids": [[4], [9, 11]]},
    {"forced_eos_token_id": 77}, {"sequence_bias": [[[9], 4.0]]}, {"exponential_decay_length_penalty": (3, 1.5)},
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
async def test_rules_of_the_scores_hold_for_beams(model: AsyncSwarmModel, theirs: Any, rule: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 11}
    settings["eos_token_id"] = common_token(theirs, 1)
    wanted = expected(theirs, [PROMPT], **settings, **rule)
    free = expected(theirs, [PROMPT], **settings)
    assert not all(torch.equal(a, b) for a, b in zip(wanted.scores, free.scores, strict=False))
    check(await model.generate(torch.tensor([PROMPT]), pad_token_id=PAD, **SCORED, **settings, **rule), wanted)


async def test_a_processor_of_ones_own(model: AsyncSwarmModel, theirs: Any) -> None:
    def odd(ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, 1::2] = -float("inf")
        return scores

    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": None, "logits_processor": [odd]}
    found = await model.generate(PROMPT, **{**settings, "eos_token_id": -1})
    assert found == expected(theirs, [PROMPT], **settings).sequences[0].tolist()
    assert not any(id % 2 for id in found[len(PROMPT) :])


@pytest.mark.parametrize("local_ends", [False, True])
@pytest.mark.parametrize("drawn", [{}, {"repetition_penalty": 1.4}, SAMPLED], ids=["greedy", "penalized", "sampled"])
async def test_scores_of_one_answer(swarm: LocalSwarm, theirs: Any, drawn: dict[str, Any], local_ends: bool) -> None:
    """As transformers processes the logits of this very text; what was drawn is among what could be."""
    async with swarm.connect(local_ends=local_ends) as client:
        found = await client.generate(
            torch.tensor([PROMPT]), max_new_tokens=9, eos_token_id=-1, num_return_sequences=1, **SCORED, **drawn
        )
        quiet = await client.generate(torch.tensor([PROMPT]), max_new_tokens=9, eos_token_id=-1, **drawn)
    assert torch.equal(found.sequences, quiet)
    said = found.sequences[0].tolist()
    follow = count(len(PROMPT))

    def say(ids: Any, scores: Any) -> Any:
        """Let transformers say the same, whatever its own noise."""
        forced = torch.full_like(scores, -float("inf"))
        forced[:, said[next(follow)]] = 0
        return forced

    wanted = expected(theirs, [PROMPT], max_new_tokens=9, eos_token_id=None, logits_processor=[say])
    processors = theirs._get_logits_processor(
        theirs._prepare_generation_config(None, **{"do_sample": False, **drawn})[0], len(PROMPT), torch.tensor([PROMPT])
    )
    for place, (mine, logits) in enumerate(zip(found.scores, wanted.logits, strict=True)):
        np.testing.assert_allclose(found.logits[place], logits, atol=2e-3, rtol=1e-4)
        other = processors(torch.tensor([said[: len(PROMPT) + place]]), logits.clone())
        np.testing.assert_allclose(mine, other, atol=3e-3, rtol=1e-4)
        assert torch.isfinite(mine[0, said[len(PROMPT) + place]])
    assert found.sequences_scores is None


async def test_answers_of_several_lengths_have_no_numbers_behind_their_end(model: AsyncSwarmModel, theirs: Any) -> None:
    alone = expected(theirs, [PROMPT], max_new_tokens=8, eos_token_id=None).sequences[0].tolist()
    prompts, ends = [PROMPT, [9, 8, 7]], alone[len(PROMPT) + 2]
    found = await model.generate(prompts, max_new_tokens=8, eos_token_id=ends, **SCORED)
    lengths = [len(row) - len(prompt) for row, prompt in zip(found.sequences, prompts, strict=True)]
    assert lengths[0] <= 3 < max(lengths)
    assert [int(step[0].isnan().all()) for step in found.scores].count(0) == lengths[0]
    assert len(found.scores) == max(lengths)


async def test_where_peers_have_no_room_beams_take_turns(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "length_penalty": 0.5}
    settings["eos_token_id"] = common_token(theirs, 4)
    wanted = expected(theirs, [PROMPT], **settings)
    refused: list[PeerError] = []
    fork = Session.fork

    async def note(session: Session) -> Session:
        try:
            return await fork(session)
        except PeerError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Session, "fork", note)
    # Two sessions of 144 tokens are all that fit.
    async with local_swarm(tiny_llama(), spans(4, 2), cache_tokens=320) as small, small.connect() as client:
        check(await client.generate(torch.tensor([PROMPT]), pad_token_id=PAD, **SCORED, **settings), wanted)
    assert refused
    assert all(error.busy for error in refused)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def twofold() -> AsyncIterator[LocalSwarm]:
    """Two peers for each of three spans."""
    async with local_swarm(tiny_llama(), [*spans(4, 3), *spans(4, 3)], exact=True) as running:
        yield running


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("method", "call"),
    [("step", 2), ("fork", 4), *(pytest.param(*each, marks=pytest.mark.full) for each in [("step", 11), ("fork", 1)])],
)
async def test_failover_gives_the_same_beams(
    twofold: LocalSwarm, place: int, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer crashes just before a session's step, or before it is forked."""
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8, "eos_token_id": -1}
    async with twofold.connect(exact=True) as client:
        wanted = await client.generate(torch.tensor([PROMPT]), **SCORED, **settings)
    crashed = crashing(twofold, place, method, call, monkeypatch)
    async with twofold.connect(exact=True) as client:
        found = await client.generate(torch.tensor([PROMPT]), **SCORED, **settings)
    assert len(crashed) == 1
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.sequences_scores, wanted.sequences_scores)
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(found[name], wanted[name], strict=True))
    for peer in twofold.peers:
        await released(peer)


def crashing(
    swarm: LocalSwarm, place: int, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> list[PeerServer]:
    """The peer at that place of the route crashes before the call-th call of a session's method; it is noted here."""
    plain, calls, crashed = getattr(Session, method), count(1), list[PeerServer]()

    async def disturbed(session: Session, *arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            name = session.route[place].peer.peer_id
            crashed.extend(peer for peer in swarm.peers if peer.identity.peer_id == name)
            await crash(crashed[0])
        return await plain(session, *arguments, **options)

    monkeypatch.setattr(Session, method, disturbed)
    return crashed


async def test_a_fork_that_is_refused_costs_time_alone(
    model: AsyncSwarmModel, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a peer refuses for a reason of its own."""

    async def refuse(session: Session) -> Session:
        raise PeerError("A", grpc.StatusCode.PERMISSION_DENIED, "no forks here", "A")

    monkeypatch.setattr(Session, "fork", refuse)
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9}
    wanted = expected(theirs, [PROMPT], eos_token_id=None, **settings)
    check(await model.generate(torch.tensor([PROMPT]), eos_token_id=-1, **SCORED, **settings), wanted)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 2, "temperature": 0.7}, "num_beams takes the likeliest tokens and draws none"),
        ({"num_beams": 2, "num_return_sequences": 3}, "2 beams give no 3 num_return_sequences"),
        ({"num_beams": 0}, "num_beams is a number of at least 1, not 0"),
        ({"early_stopping": "soon"}, "early_stopping is True, False or"),
    ],
)
async def test_what_makes_no_sense_is_refused(model: AsyncSwarmModel, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        await model.generate(PROMPT, **settings)


async def test_numbers_come_where_they_were_asked_for(model: AsyncSwarmModel) -> None:
    for settings, names in (
        ({}, {"beam_indices"}),
        ({"output_scores": True}, {"beam_indices", "scores", "sequences_scores"}),
    ):
        found = await model.generate(PROMPT, num_beams=2, max_new_tokens=3, return_dict_in_generate=True, **settings)
        given = {name for name in ("scores", "logits", "sequences_scores", "beam_indices") if found[name] is not None}
        assert given == names
    assert await model.generate(PROMPT, num_beams=2, max_new_tokens=3, output_scores=True) == found.sequences


async def test_beams_come_whole(model: AsyncSwarmModel) -> None:
    with pytest.raises(SettingsError, match="num_beams=2 is for generate, which gives whole answers"):
        [chunk async for chunk in model.stream(PROMPT, num_beams=2)]


SCRIPT = """
import sys
from petal import SwarmModel
with SwarmModel.connect("demo", initial_peers=[sys.argv[1]], wait_s=20) as model:
    found = model.generate("Hi", max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    print(type(found.scores[0]).__name__, tuple(found.scores[0].shape))
"""


async def test_scores_are_tensors_though_a_drafters_thread_imports_torch(demo: AsyncSwarmModel) -> None:
    """Half of torch is there then: who uses that may hang."""
    address = (await demo.route())[0].peer.addresses[0]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, address, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await asyncio.wait_for(process.communicate(), 60)
    assert out.decode().split() == ["Tensor", "(1,", "49152)"], error.decode()
