"""Swarms whose peers hold quantized weights: exact in themselves, kept apart from others, refused where none fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from petal.client.routing.route import NoRoute, choose_route
from petal.peer import server
from petal.peer.joining import ServeError

from ..support.commands import serve
from ..support.random_drafter import RandomDrafter
from ..support.swarms import local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama

PROMPT = [5, 17, 90, 33, 2, 8]
SETTINGS = {"max_new_tokens": 30, "seed": 3, "eos_token_id": -1, "temperature": 0.8}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quant", ["int8", pytest.param("nf4", marks=pytest.mark.full), "int4"])
async def test_any_split_and_tree_gives_the_same_tokens(quant: str) -> None:
    answers = []
    for peers in (1, 3):
        async with (
            local_swarm(tiny_llama(), spans(4, peers), quant=quant, exact=True) as swarm,
            swarm.connect(exact=True) as client,
        ):
            records = [peer.record() for peer in swarm.peers]
            assert {(r.quantization, r.dtype) for r in records} == {(quant, "bf16")}
            assert all(r.numerics.startswith(f"{quant}/bf16/") for r in records)
            ids = await client.generate(PROMPT, **SETTINGS)
            drafter = RandomDrafter.knowing(ids, VOCAB, peers)
            answers += [ids, await client.generate(PROMPT, drafter=drafter, budget=12, **SETTINGS)]
    assert all(answer == answers[0] for answer in answers)


async def test_a_route_keeps_to_one_format_unless_it_may_mix() -> None:
    async with (
        local_swarm(tiny_llama(), [range(0, 2)], quant="int8") as front,
        local_swarm(tiny_llama(), [range(2, 4)], join=front.address, quant="int4") as back,
    ):
        async with front.connect(allow_mixed=True) as client:
            assert len(await client.generate(PROMPT, **SETTINGS)) == len(PROMPT) + SETTINGS["max_new_tokens"]
        records = [swarm.peers[0].record() for swarm in (front, back)]
        with pytest.raises(NoRoute, match=r"blocks 2-3 are served in int4 \(bf16\) only, the others in int8 \(bf16\)"):
            choose_route(records, {})


async def test_a_client_that_holds_the_head_holds_it_as_the_tail_does() -> None:
    async with local_swarm(tiny_llama(), spans(4, 2), quant="int4", exact=True) as swarm:
        async with swarm.connect(exact=True) as client:
            expected = await client.generate(PROMPT, **SETTINGS)
        async with swarm.connect(exact=True, local_ends=True) as client:
            assert await client.generate(PROMPT, **SETTINGS) == expected


async def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "free_bytes", lambda backend: 200_000)
    with pytest.raises(ServeError, match=r"blocks 0:4 do not fit .* of 4 blocks fit 0 with --quant none, . with"):
        async with local_swarm(tiny_llama(), spans(4, 1)):
            pass


def test_a_format_that_is_none_is_named(tmp_path) -> None:
    unknown = serve(tiny_llama(), "--quant", "int5", tmp_path=tmp_path)
    assert unknown.code == 2
    assert "int5" in unknown.output
    assert "gguf" in unknown.output
    other = serve(tiny_llama(), "--quant", "aqlm", tmp_path=tmp_path)
    assert other.code == 1
    assert "does not store aqlm weights: choose --quant none, int8, int4, nf4" in other.output
