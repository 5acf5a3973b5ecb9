"""Texts that follow a grammar: the last stage masks every draw, the client its drafts, and no text depends on them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import torch
from petal.client.arguments import SettingsError
from petal.client.drafting.drafter import ScoredTree
from petal.client.drafting.grammar import pruned
from petal.client.routing.route import NoRoute
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.grammar import checker as checker_module
from petal.protocol.grammar.checker import GrammarChecker
from petal.protocol.grammar.grammar import GrammarCompiler, GrammarError, json_grammar, masked, regex_grammar
from petal.protocol.wire.sampling import SamplingError

from ..client.gateway.gateways import chatting_llama
from ..support.disturbed import crash
from ..support.random_drafter import RandomDrafter
from ..support.swarms import LocalSwarm, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
VOCAB = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z ]{0,8}$"},
        "kind": {"enum": ["lion", "lioness", "cat"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
PROMPT = "An animal: "
SETTINGS = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "seed": 4, "top_k": 30}]


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    spans = [range(0, 2), range(2, 4)]
    async with local_swarm(chatting_llama(), [*spans, *spans], exact=True) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(swarm: LocalSwarm) -> AsyncIterator[AsyncSwarmModel]:
    async with swarm.connect(exact=True) as connected:
        yield connected


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    with open_checkpoint(str(chatting_llama())) as checkpoint:
        return GrammarCompiler(checkpoint.tokenizer(), VOCAB)


def check(text: str) -> None:
    said = json.loads(text)
    assert set(said) == {"name", "kind", "sizes"}
    assert re.fullmatch("[a-z ]{0,8}", said["name"])
    assert said["kind"] in ("lion", "lioness", "cat")
    assert all(0 <= size <= 99 for size in said["sizes"])
    assert len(said["sizes"]) <= 3


@pytest.mark.parametrize("settings", SETTINGS)
async def test_text_is_valid_and_the_same_whatever_is_drafted(client: AsyncSwarmModel, settings: dict) -> None:
    asked = {"max_new_tokens": 120, "json_schema": SCHEMA, **settings}
    plain = await client.generate(PROMPT, drafter="none", **asked)
    check(plain)
    free = await client.generate(PROMPT, max_new_tokens=120, **settings)
    assert free != plain
    assert await client.generate(PROMPT, drafter="ngram", budget=8, **asked) == plain
    known = [*client.tokenizer.encode(PROMPT), *client.tokenizer.encode(plain)]
    for seed in range(3):
        drafter = RandomDrafter.knowing(known, VOCAB, seed)
        chunks = [chunk async for chunk in client.stream(PROMPT, drafter=drafter, budget=24, **asked)]
        assert "".join(chunk.text for chunk in chunks) == plain
        assert len(chunks) < len(plain), "no draft was taken"


async def test_a_last_stage_that_dies_is_followed_by_one_that_masks_alike(
    swarm: LocalSwarm, client: AsyncSwarmModel
) -> None:
    asked = {"max_new_tokens": 120, "json_schema": SCHEMA, "temperature": 1.0, "seed": 11, "drafter": "none"}
    expected = await client.generate(PROMPT, **asked)
    said, events = "", []
    async for chunk in client.stream(PROMPT, **asked):
        said, events = said + chunk.text, [*events, *chunk.events]
        if len(said) == 12:
            last = next(peer for peer in swarm.peers if peer.blocks.start == 2 and len(peer.service.sessions))
            await crash(last)
    assert said == expected
    assert events, "nobody failed"


async def test_regex_and_lark(client: AsyncSwarmModel) -> None:
    text = await client.generate(PROMPT, regex="(ab|cd){2,5}[0-9]{3}", max_new_tokens=40, temperature=1.0)
    assert re.fullmatch("(ab|cd){2,5}[0-9]{3}", text)
    lark = 'start: "<" word ("," word)~1..3 ">"\nword: /[xyz]+/'
    text = await client.generate(PROMPT, grammar=lark, max_new_tokens=200, temperature=1.5, seed=2)
    assert re.fullmatch("<[xyz]+(,[xyz]+){1,3}>", text)


async def test_bad_grammars_are_told_of(client: AsyncSwarmModel) -> None:
    for settings, words in (
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
        ({"json_schema": "{"}, "no JSON"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"regex": "("}, "regex"),
        ({"regex": "a", "json_schema": {}}, "one of them"),
        ({"regex": 3}, "text"),
        ({"json_schema": {"type": "string", "pattern": "(?=x)y"}}, "grammar"),
    ):
        with pytest.raises((SettingsError, RuntimeError), match=words):
            await client.generate(PROMPT, max_new_tokens=4, **settings)
    assert await client.generate(PROMPT, max_new_tokens=4)


async def test_who_cannot_mask_is_passed_by(client: AsyncSwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.tokenizer, "vocab_digest", "another")
    with pytest.raises(NoRoute, match="grammars"):
        await client.generate(PROMPT, max_new_tokens=4, regex="a+")


async def test_biases_shift_what_is_drawn(client: AsyncSwarmModel) -> None:
    asked = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    prompt = list(PROMPT.encode())
    free = (await client.generate(prompt, **asked))[len(prompt) :]
    banned = dict.fromkeys(free, -100.0)
    other = await client.generate(prompt, drafter="none", logit_bias=banned, **asked)
    assert not {*other[len(prompt) :]} & {*free}
    assert await client.generate(prompt, drafter="ngram", budget=6, logit_bias=banned, **asked) == other
    assert await client.generate(PROMPT, logit_bias={ord("q"): 100}, **asked) == "q" * 12
    with pytest.raises(SamplingError, match="-100 to 100"):
        await client.generate(PROMPT, logit_bias={1: float("nan")}, **asked)
    with pytest.raises(RuntimeError, match="vocabulary"):
        await client.generate(PROMPT, logit_bias={1000: 1.0}, **asked)


async def test_local_ends_mask_as_peers_do(swarm: LocalSwarm, client: AsyncSwarmModel) -> None:
    asked = {"max_new_tokens": 60, "json_schema": SCHEMA, "temperature": 1.0, "seed": 3, "logit_bias": {ord("z"): 3.0}}
    async with swarm.connect(exact=True, local_ends=True) as local:
        assert await local.generate(PROMPT, **asked) == await client.generate(PROMPT, **asked)


async def test_masks_do_not_depend_on_the_way(compiler: GrammarCompiler) -> None:
    """Rolled back or made anew, a matcher allows the same."""
    moved, rng = compiler.compile(json_grammar(SCHEMA)), random.Random(0)
    texts: list[list[int]] = [[]]
    for _ in range(120):
        said = rng.choice(texts)
        mask = moved.allowed(said)
        assert (mask == moved.fresh().allowed(said)).all()
        token = rng.choice(mask.nonzero()[0].tolist())
        assert moved.follows(said, [token]) == (token not in compiler.tokenizer.eos_ids)
        texts.append([*said, token])
    with pytest.raises(GrammarError, match="followed"):
        moved.allowed([1, 3])
    assert moved.allowed([]).sum() == 1
    with pytest.raises(SamplingError):
        masked(moved, 2)([7, 7, 1, 3], moved.allowed([]) * 1.0)


async def test_drafts_are_pruned_with_all_below(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex_grammar("ab(c|d)"))
    ids = tuple(b"aXbccXd")
    tree = ScoredTree(ids, (-1, 0, 0, 2, 1, 2, 2), tuple(-float(row) for row in range(7)))
    assert bytes(pruned(tree, matcher, list(b"a")).ids) == b"abcd"
    assert pruned(tree, matcher, list(b"a")).parents == (-1, 0, 1, 1)


async def test_a_grammar_that_takes_too_long_is_ended(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = GrammarChecker(compiler)
    try:
        assert (await checker.matcher(regex_grammar("a+"))).allowed([]).sum() == 1
        first = checker._worker
        monkeypatch.setattr(checker_module, "COMPILE_S", 0.0)
        with pytest.raises(GrammarError, match="too much time"):
            await checker.matcher(regex_grammar("b+"))
        assert first is not None
        assert first.returncode is not None
        monkeypatch.undo()
        both = await asyncio.gather(checker.matcher(regex_grammar("b+")), checker.matcher(regex_grammar("c+")))
        assert [matcher.allowed([]).nonzero()[0].tolist() for matcher in both] == [[98], [99]]
        with pytest.raises(GrammarError, match="characters"):
            await checker.matcher("x" * (1 << 20))
    finally:
        await checker.close()
