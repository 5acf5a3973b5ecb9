"""Drafters by name: what becomes of one that cannot be loaded."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from petal.client import model_packages
from petal.client.drafting import registry
from petal.client.drafting.drafter import Drafter, DrafterError
from petal.client.drafting.ngram import NgramDrafter
from petal.client.drafting.registry import DrafterRegistry, load_drafter
from petal.protocol.checkpoint.open import open_checkpoint


class Loader:
    """Fails so many times, then gives a drafter."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self, source: str, *_: object) -> Drafter:
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


async def test_an_automatic_drafter_that_failed_is_tried_again(
    drafters: DrafterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(failures=1)
    monkeypatch.setattr(registry, "load_drafter", loader)
    await until_loaded(drafters)
    await until_loaded(drafters)
    assert len(await drafters.drafters("auto")) == 2
    assert loader.calls == 2


async def test_a_hopeless_drafter_is_not_tried_all_the_time(
    drafters: DrafterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(failures=99)
    monkeypatch.setattr(registry, "load_drafter", loader)
    for _ in range(9):
        await until_loaded(drafters)
    assert loader.calls == 2


class Halfway:
    """A module that another thread imports just now: the first so many tries find parts of it missing."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def find_spec(self, name: str, *_: object) -> None:
        if name == "petal.client.drafting.model" and self.failures:
            self.failures -= 1
            raise ImportError("cannot import name 'AttentionInterface' from 'transformers'")


@pytest.mark.parametrize(("failures", "there"), [(3, True), (99, False)])
def test_imports_of_another_thread_are_waited_for(monkeypatch: pytest.MonkeyPatch, failures: int, there: bool) -> None:
    monkeypatch.setattr(model_packages, "_PAUSE_S", 0.0)
    monkeypatch.setattr(sys, "meta_path", [Halfway(failures), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "petal.client.drafting.model", raising=False)
    with pytest.raises(DrafterError, match="no drafter in nowhere" if there else "needs more packages"):
        load_drafter("nowhere", SimpleNamespace())  # type: ignore[arg-type]


def test_what_is_not_installed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    halfway = Halfway(99)
    monkeypatch.setattr(model_packages, "are_installed", lambda: False)
    monkeypatch.setattr(sys, "meta_path", [halfway, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "petal.client.drafting.model", raising=False)
    with pytest.raises(DrafterError, match="needs more packages"):
        load_drafter("nowhere", SimpleNamespace())  # type: ignore[arg-type]
    assert halfway.failures == 98


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


async def test_drafters_that_are_not_installed_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """petal-swarm alone, without the package that brings them."""
    with open_checkpoint("demo") as demo:
        digest, tokenizer = bytes.fromhex(demo.digest()), demo.tokenizer()
    assert registry.shipped_drafter(digest) is not None
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "drafters")
    drafters = DrafterRegistry(tokenizer, digest)
    assert [type(drafter) for drafter in await drafters.drafters("auto")] == [NgramDrafter]
    with pytest.raises(DrafterError, match=r"pip install 'petal-swarm\[drafter\]' brings that of the demo's model"):
        await drafters.drafters("model")
