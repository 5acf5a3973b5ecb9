"""The card's backend: handles, storage and captured graphs; a small model of its own parts runs through them."""

from __future__ import annotations

import random

import pytest
import torch
from petal.kernels import registry
from petal.kernels.backend import Attend, Batch, EagerRunner
from petal.kernels.cuda.backend import NoKernels
from petal.kernels.cuda.runner import CudaRunner, Size
from petal.kernels.formats.base import QuantizedTensor
from petal.kernels.formats.registry import FORMATS
from petal.kernels.torch.backend import TorchBackend
from torch import Tensor

from tests.kernels.batches import chain, tree
from tests.kernels.cuda.small_model import HEAD, KV_HEADS, LAYERS, PAGE, SPEC, WIDTH, Model, plan_of
from tests.kernels.quantized_weights import random_tensors

CARD = pytest.mark.cuda


def test_a_size_holds_its_plan():
    pages = list(range(200))
    plan = plan_of([(1000, tree(13)), (3, [-1])], [pages, pages[:1]])
    size = Size.of(plan)
    assert size == Size(16, 16, 16, 1024, 16, 1, PAGE)
    flat = size.flat(plan)
    assert len(flat) == size.numbers
    metadata = size.metadata(torch.tensor(flat, dtype=torch.int32))[0]
    assert metadata.row_start[:2].tolist() == [0, 13]
    assert metadata.row_count.tolist() == [13, 1] + [0] * 14
    assert metadata.positions[:14].tolist() == plan.positions
    assert metadata.page_table[0].tolist() == pages[:64]
    assert metadata.page_table[1].tolist() == [0] + [-1] * 63
    assert (metadata.page_table[2:] == -1).all()


@pytest.mark.parametrize(
    ("segments", "rows"),
    [([(0, chain(257))], None), ([(40_000, [-1])], None), ([(9, [-1])], 8), ([(100, tree(200))], 256)],
    ids=["many rows", "long", "one", "tree"],
)
def test_what_fits_no_size_runs_as_it_comes(segments, rows):
    size = Size.of(plan_of(segments, [[0]]))
    assert (size and size.rows) == rows


def test_as_it_comes_nothing_is_padded():
    plan = plan_of([(20, tree(5)), (0, chain(70))], [[1, 2], [3, 4, 5, 6, 7]])
    size = Size.exactly(plan)
    assert (size.rows, size.segments, size.context, size.widest) == (75, 2, 70, 70)
    table = size.metadata(torch.tensor(size.flat(plan), dtype=torch.int32))[0].page_table
    assert table.tolist() == [[1, 2, -1, -1, -1], [3, 4, 5, 6, 7]]


def test_a_card_that_our_kernels_do_not_know_is_served_by_torch(monkeypatch, caplog):
    def refuse(device: torch.device) -> None:
        raise NoKernels(f"kernels need another card than {device}")

    monkeypatch.setattr(registry, "_there", lambda device: None)
    monkeypatch.setattr(registry, "CudaBackend", refuse)
    assert isinstance(registry.backend_for("cuda:1"), TorchBackend)
    assert [record.message for record in caplog.records] == [
        "kernels need another card than cuda:1",
        "cuda:1 computes through torch, without kernels of our own: that is slow",
    ]


@pytest.fixture(scope="module")
def backend():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from petal.kernels.cuda.backend import CudaBackend

    return CudaBackend(torch.device("cuda", 0))


class Served:
    """A model with its storage; both ways to run it."""

    def __init__(self, backend, pages: int = 400) -> None:
        self.model = Model(backend)
        self.storage = backend.kv_storage([SPEC] * LAYERS, pages, PAGE)
        self.eager = EagerRunner(backend, self.model, self.storage, [0] * LAYERS)
        self.graphs = backend.runner(self.model, self.storage, [0] * LAYERS)
        self.all = range(LAYERS)


def hidden(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


@CARD
@pytest.mark.parametrize("name", ["bf16", "int4", "nf4", "int8", "q4_k", "q6_k", "q8_0", "aqlm", "aqlm-1x16", "spqr"])
def test_handles_are_their_matrix(backend, name):
    format, shape = FORMATS[name], (200, 768)
    tensors = random_tensors(format, shape)
    reference = format.dequantize(tensors, shape)
    bias = torch.randn(200)
    handle = backend.linear(QuantizedTensor(format, tensors, shape), bias)
    extension = handle.packed.extension is not None
    assert extension or handle.nbytes == backend.nbytes(format, shape)
    dense = handle.dense(torch.float64).cpu()
    assert float((dense - reference).norm() / reference.norm()) < 4e-3
    x = torch.randn(3, 5, 768, device="cuda")
    y = handle(x)
    expected = x.cpu().double() @ reference.T + bias
    assert y.shape == (3, 5, 200)
    assert y.dtype == x.dtype
    assert float((y.cpu().double() - expected).norm() / expected.norm()) < 8e-3
    which = torch.tensor([0, 77, 199, 64, 63], device="cuda")
    assert torch.equal(handle.rows(which).cpu().double(), dense[which.cpu()])
    assert handle.half() is handle
    with pytest.raises(ValueError, match="expected 768"):
        handle(x[..., 1:])


@CARD
def test_graphs_say_what_eager_says(backend):
    """Trees, single rows and several sessions, at growing lengths, each captured or replayed: the same bits."""
    served, pick = Served(backend), random.Random(4)
    pages = list(range(400))
    pick.shuffle(pages)
    tables = [pages[i * 40 : (i + 1) * 40] for i in range(10)]
    batches = [
        [(0, chain(40))], [(40, [-1])], [(41, tree(7))], [(44, tree(60))], [(100, [-1])],
        [(0, chain(20)), (90, tree(9))], [(30 + i, [-1]) for i in range(10)],
        [(31 + i, [-1]) for i in range(9)], [(500, tree(64))], [(0, chain(300))],
    ]  # fmt: skip
    for index, segments in enumerate(batches):
        plan = plan_of(segments, tables[: len(segments)])
        rows = hidden(len(plan.positions), index)
        eager = served.eager.run(Batch(rows, plan, served.all))
        kept = [served.storage.read(layer, torch.arange(6400)) for layer in served.all]
        again = served.graphs.run(Batch(rows, plan, served.all))
        assert torch.equal(again, eager), segments
        for layer in served.all:
            for before, after in zip(kept[layer], served.storage.read(layer, torch.arange(6400)), strict=True):
                assert torch.equal(before, after), "padding wrote into a page"
    assert isinstance(served.graphs, CudaRunner)
    assert served.graphs._capturable
    assert len(served.graphs._graphs) > 4


@CARD
def test_a_tree_is_its_paths(backend):
    """Each row of a tree in one batch equals the last of its ancestors fed one by one, bit for bit."""
    served = Served(backend)
    base, parents = 70, tree(40)
    table = list(range(20))
    prefix = hidden(base, 1)
    served.graphs.run(Batch(prefix, plan_of([(0, chain(base))], [table]), served.all))
    rows = hidden(40, 2)
    together = served.graphs.run(Batch(rows, plan_of([(base, parents)], [table]), served.all))
    for row in random.Random(1).sample(range(40), 6):
        way = [row]
        while parents[way[-1]] >= 0:
            way.append(parents[way[-1]])
        for depth, at in enumerate(reversed(way)):
            plan = plan_of([(base + depth, [-1])], [table])
            last = served.graphs.run(Batch(rows[at : at + 1], plan, served.all))
        assert torch.equal(last[0], together[row]), row


@CARD
def test_a_prefill_is_the_same_however_it_is_cut(backend):
    served, rows = Served(backend), hidden(300, 3)
    whole = served.graphs.run(Batch(rows, plan_of([(0, chain(300))], [list(range(20))]), served.all))
    at, parts = 0, []
    for count in (1, 63, 64, 100, 8, 64):
        plan = plan_of([(at, chain(count))], [list(range(100, 120))])
        parts.append(served.graphs.run(Batch(rows[at : at + count], plan, served.all)))
        at += count
    assert torch.equal(torch.cat(parts), whole)


@CARD
def test_rows_move_and_pages_are_copied(backend):
    storage = backend.kv_storage([SPEC] * LAYERS, 8, PAGE)
    keys, values = torch.randn(2, 8 * PAGE, KV_HEADS, HEAD).bfloat16().float()
    everywhere = torch.arange(8 * PAGE)
    for layer in range(LAYERS):
        storage.write(layer, everywhere, keys + layer, values - layer)
    before = [storage.read(layer, everywhere) for layer in range(LAYERS)]
    storage.move([0, 2], [5, 6, 40], [4, 5, 6])
    storage.copy_page([1], 3, 7)
    for layer in range(LAYERS):
        expected = [t.clone() for t in before[layer]]
        for t, old in zip(expected, before[layer], strict=True):
            if layer == 1:
                t[7 * PAGE :] = old[3 * PAGE : 4 * PAGE]
            else:
                t[[4, 5, 6]] = old[[5, 6, 40]]
        for found, wanted in zip(storage.read(layer, everywhere), expected, strict=True):
            assert torch.equal(found, wanted), layer
    storage.grow(11)
    assert torch.equal(storage.read(1, everywhere)[0][: 7 * PAGE], before[1][0][: 7 * PAGE])
    assert not storage.read(1, torch.arange(8 * PAGE, 11 * PAGE))[0].any()
    assert storage.page_nbytes == LAYERS * PAGE * KV_HEADS * HEAD * 2 * 2
    with pytest.raises(IndexError):
        storage.move([0], [5], [11 * PAGE])


@CARD
def test_what_cannot_be_captured_runs_as_it_comes(backend, caplog):
    served = Served(backend)

    def reads_back(rows: Tensor, positions: Tensor, attend: Attend, blocks: range) -> Tensor:
        assert float(rows.float().sum()) < 1e9  # a host that waits
        return served.model(rows, positions, attend, blocks)

    runner = backend.runner(reads_back, served.storage, [0] * LAYERS)
    plan, rows = plan_of([(0, chain(5))], [[0]]), hidden(5, 1)
    expected = served.eager.run(Batch(rows, plan, served.all))
    for _ in range(2):
        assert torch.equal(runner.run(Batch(rows, plan, served.all)), expected)
    assert sum("without captured graphs" in record.message for record in caplog.records) == 1


@CARD
def test_facts(backend):
    assert backend.arithmetic(torch.bfloat16).startswith("sm")
    assert backend.exactness_obstacle([64]) == ""
    assert backend.free_bytes(1) > 1 << 30
    with pytest.raises(ValueError, match="bfloat16"):
        backend.kv_storage([SPEC], 4, PAGE, torch.float32)
