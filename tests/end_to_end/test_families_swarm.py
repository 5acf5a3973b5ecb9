"""A family that attends by code of its own, end to end: peers, draft trees, token by token as transformers says."""

from __future__ import annotations

from pathlib import Path

from ..support.families import reference, save_tiny
from ..support.family_configs import VOCAB
from ..support.random_drafter import RandomDrafter
from ..support.reference import greedy
from ..support.swarms import local_swarm, spans

PROMPT = [5, 17, 90, 33, 2, 8]


async def test_bloom_through_three_peers(tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    save_tiny("bloom", folder)
    expected, margins = greedy(reference(folder), PROMPT, 40)
    assert min(margins) > 1e-3, "a tie would show nothing"
    async with local_swarm(folder, spans(4, 3)) as swarm, swarm.connect() as client:
        settings = {"max_new_tokens": 40, "eos_token_id": -1}
        assert await client.generate(PROMPT, **settings) == PROMPT + expected
        drafter = RandomDrafter.knowing(PROMPT + expected, VOCAB, 0)
        pieces = [piece async for piece in client.stream(PROMPT, drafter=drafter, budget=12, **settings)]
    assert [token for piece in pieces for token in piece.ids] == expected
    assert len(pieces) < 40, "no draft was ever accepted: the trees show nothing"
