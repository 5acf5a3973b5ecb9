"""Graphs without a card: what is captured reads static buffers alone, padded; a replay runs the same on what is there.

A graph is stood in for by a function that is run again on the buffers that the capture saw, and whose result is copied
into the capture's; attention is plain torch. So whatever a replay may not do (see new tensors, make its own) shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from petal.kernels.backend import Batch, EagerRunner
from petal.kernels.cuda import runner as module
from petal.kernels.cuda.runner import CudaRunner, RowGraphs
from petal.kernels.metadata import BatchPlan
from petal.kernels.torch.backend import TorchBackend
from petal.kernels.torch.storage import TorchKVStorage
from torch import Tensor

from tests.kernels.batches import chain, tree
from tests.kernels.cuda.small_model import LAYERS, PAGE, SPEC, WIDTH, Model, plan_of

ALL = range(LAYERS)


class Replayed:
    """Stands in for a graph."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.out = run()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self._run())


class Graphs:
    """Stands in for `runner.Graphs`."""

    def __init__(self) -> None:
        self.made: list[Replayed] = []

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replayed, Tensor]:
        self.made.append(Replayed(run))
        return self.made[-1], self.made[-1].out


class Event:
    """Transfers on a CPU are over when they return."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Storage(TorchKVStorage):
    device = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(module.torch, "zeros", lambda *size, pin_memory=False, **more: zeros(*size, **more))
    monkeypatch.setattr(module.torch.cuda, "Event", Event)


class Served:
    """A small model that runs eagerly and through captured graphs, each over pages of its own."""

    def __init__(self) -> None:
        backend = TorchBackend(torch.device("cpu"))
        self.model = Model(backend)
        self.pages = [Storage(torch.device("cpu"), [SPEC] * LAYERS, 400, PAGE, torch.float32) for _ in range(2)]
        self.graphs = Graphs()
        self.eager = EagerRunner(backend, self.model, self.pages[0], [0] * LAYERS)
        self.captured = CudaRunner(self.graphs, self.model, self.pages[1], [0] * LAYERS)  # type: ignore[arg-type]

    def both(self, plan: BatchPlan, rows: Tensor) -> None:
        batch = Batch(rows, plan, ALL)
        torch.testing.assert_close(self.captured.run(batch), self.eager.run(batch), rtol=1e-4, atol=1e-4)
        for layer in ALL:
            for mine, theirs in zip(self.pages[1].keys, self.pages[0].keys, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=f"padding wrote in layer {layer}")


def rows_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_graphs_say_what_eager_says() -> None:
    """Trees, single rows, several sessions: other numbers of rows and segments each time, few graphs."""
    served, pick = Served(), random.Random(3)
    pages = pick.sample(range(400), 400)
    tables = [pages[40 * i : 40 * (i + 1)] for i in range(10)]
    batches: Sequence[list[tuple[int, list[int]]]] = [
        [(0, chain(30))], [(30, [-1])], [(31, tree(7))], [(33, tree(5))], [(34, [-1])], [(35, tree(20))],
        [(0, chain(6)), (36, tree(4))], [(40 + i, [-1]) for i in range(9)], [(41 + i, [-1]) for i in range(10)],
    ]  # fmt: skip
    for seed, segments in enumerate(batches):
        plan = plan_of(segments, tables[: len(segments)])
        served.both(plan, rows_of(len(plan.positions), seed))
    assert sum(graph.replays for graph in served.graphs.made) == len(batches)
    assert len(served.graphs.made) < len(batches)


def test_what_is_captured_stays_when_its_callers_tensors_go() -> None:
    """Two batches of one size: the second is no echo of the first, whose result is the caller's own."""
    served = Served()
    plan = plan_of([(0, chain(5))], [[3]])
    first = served.captured.run(Batch(rows_of(5, 1), plan, ALL))
    kept = first.clone()
    second = served.captured.run(Batch(rows_of(5, 2), plan, ALL))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert len(served.graphs.made) == 1


def test_long_batches_run_as_they_come() -> None:
    served = Served()
    served.both(plan_of([(0, chain(300))], [list(range(20))]), rows_of(300, 4))
    assert not served.graphs.made


def test_ids_and_parts_of_a_span_have_graphs_of_their_own() -> None:
    served = Served()
    plan = plan_of([(0, chain(4))], [[0]])
    rows = rows_of(4, 5)
    half = served.captured.run(Batch(rows, plan, range(1)))
    whole = served.captured.run(Batch(rows, plan, ALL))
    torch.testing.assert_close(served.captured.run(Batch(half, plan, range(1, LAYERS))), whole, rtol=1e-4, atol=1e-4)
    assert len(served.graphs.made) == 3


def test_what_cannot_be_captured_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], Tensor]) -> None:
        raise RuntimeError("a host that waits\nand more")

    served = Served()
    monkeypatch.setattr(served.graphs, "capture", refuse)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda device: None)
    plan = plan_of([(0, chain(5))], [[0]])
    for _ in range(2):
        served.both(plan, rows_of(5, 1))
    assert [record.message for record in caplog.records] == [
        "this model runs without captured graphs: a host that waits"
    ]


@pytest.mark.parametrize("count", [1, 8, 9, 200, 300])
def test_rows_by_themselves_are_padded(count: int) -> None:
    graphs = Graphs()
    doubled = RowGraphs(graphs, lambda rows: 2 * rows)  # type: ignore[arg-type]
    for seed in (1, 2):
        rows = rows_of(count, seed)
        assert torch.equal(doubled(rows), 2 * rows)
    assert len(graphs.made) == (count <= 256)


@pytest.mark.parametrize("levels", [(1, 3, 9), (12, 12, 12, 12, 12, 12)], ids=["few", "many"])
def test_a_tree_that_grows_by_levels_is_the_tree(levels: tuple[int, ...]) -> None:
    """Rows of earlier forwards are listed, not asked: each level says what the whole tree at once says of it."""
    served, parents = Served(), tree(sum(levels))
    prefix = plan_of([(0, chain(20))], [[0, 1, 2, 3, 4, 5, 6]])
    for way in (served.eager, served.captured):
        way.run(Batch(rows_of(20, 1), prefix, ALL))
    rows = rows_of(len(parents), 2)
    whole = plan_of([(20, parents)], [[0, 1, 2, 3, 4, 5, 6]])
    expected = served.eager.run(Batch(rows, whole, ALL))
    stored = 0
    for count in levels:
        till = stored + count
        plan = replace(plan_of([(20, parents[:till])], [[0, 1, 2, 3, 4, 5, 6]]), stored=[stored])
        assert plan.asking == count
        for way in (served.eager, served.captured):
            found = way.run(Batch(rows[stored:till], plan, ALL))
            torch.testing.assert_close(found, expected[stored:till], rtol=1e-4, atol=1e-4)
        stored = till


def test_a_full_card_is_no_reason_to_do_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    served, plan = Served(), plan_of([(0, chain(5))], [[0]])

    def full(run: Callable[[], Tensor]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(served.graphs, "capture", full)
        with pytest.raises(torch.OutOfMemoryError):
            served.captured.run(Batch(rows_of(5, 1), plan, ALL))
    served.both(plan, rows_of(5, 1))
    assert len(served.graphs.made) == 1
