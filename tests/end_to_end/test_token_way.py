"""A token's way stays short."""

from __future__ import annotations

import pytest

from ..bench.token_way import token_way
from ..support.tiny import tiny_llama


def within(figures: dict[str, float], bounds: dict[str, float]) -> bool:
    return all(figures[name] <= bound for name, bound in bounds.items())


async def test_a_token_of_a_tiny_model() -> None:
    """Its four blocks count little: what is bounded is what client and peers do around them."""
    figures = (await token_way(tiny_llama(), 4, 12)).figures()
    assert within(figures, {"calls": 700, "changes": 345, "middle_files": 24}), figures
    assert not within(figures, {"calls": 350}), "nothing was counted"


@pytest.mark.full
async def test_a_token_of_thirty_blocks() -> None:
    """Half of what it was when it was first counted: 2,295 calls and 1,204 changes of file."""
    figures = (await token_way("demo", 30, 12)).figures()
    assert within(figures, {"calls": 1147, "changes": 602, "middle_files": 24}), figures
