"""Drafters by name: what becomes of one that cannot be loaded."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from petal.client.drafting import registry
from petal.client.drafting.drafter import Drafter, DrafterError
from petal.client.drafting.ngram import NgramDrafter
from petal.client.drafting.registry import DrafterRegistry


class Loader:
    """Fails so many times, then gives a drafter."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self, source: str, _: object) -> Drafter:
        self.calls += 1
        if self.calls <= self.failures:
            raise DrafterError(f"no drafter in {source}")
        return NgramDrafter()


@pytest.fixture
def drafters(monkeypatch: pytest.MonkeyPatch) -> DrafterRegistry:
    monkeypatch.setattr(registry, "shipped_drafter", lambda _: Path("shipped"))
    return DrafterRegistry(SimpleNamespace(), b"")  # type: ignore[arg-type]


async def until_loaded(drafters: DrafterRegistry) -> None:
    await drafters.drafters("auto")
    await asyncio.wait(drafters._models._loads.values())


async def test_an_automatic_drafter_that_fails_is_said_once_and_left_out(
    drafters: DrafterRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "load_drafter", Loader(failures=9))
    await until_loaded(drafters)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert [type(drafter) for drafter in await drafters.drafters("auto")] == [NgramDrafter]
    assert [record.getMessage() for record in caplog.records] == [
        "drafting goes on without the model's own drafter: no drafter in shipped"
    ]


async def test_an_automatic_drafter_that_loads_takes_part(
    drafters: DrafterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "load_drafter", Loader(failures=0))
    await until_loaded(drafters)
    assert len(await drafters.drafters("auto")) == 2


async def test_one_that_is_asked_for_by_name_is_tried_again(
    drafters: DrafterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(failures=1)
    monkeypatch.setattr(registry, "load_drafter", loader)
    with pytest.raises(DrafterError, match="no drafter in some/model"):
        await drafters.drafters("some/model")
    for _ in range(3):
        assert len(await drafters.drafters("some/model")) == 1
    assert loader.calls == 2
