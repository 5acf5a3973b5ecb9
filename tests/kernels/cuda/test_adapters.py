"""Adapters of several sessions on a card: each row gets what its own adds, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.cuda.adapters import Adapters
from petal.kernels.cuda.experts import Grouping
from petal.kernels.cuda.runtime import Runtime, runtime
from torch import Tensor

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def card() -> Runtime:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return runtime(torch.device("cuda", 0))


def random_adapters(width: int, outputs: int, ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(width)
    return [
        (torch.randn(rank, width, generator=noise) / width**0.5, torch.randn(outputs, rank, generator=noise))
        for rank in ranks
    ]


@pytest.mark.parametrize(("width", "outputs"), [(4096, 1280), (768, 72), (99, 31), (8, 8)])
@pytest.mark.parametrize("ranks", [(16,), (4, 16, 64, 33), (256, 8)], ids=str)
def test_each_row_has_its_own(card, width, outputs, ranks):
    parts = random_adapters(width, outputs, ranks)
    adapters, grouping = Adapters(card, parts), Grouping(card)
    rows = 75
    x, y = (torch.randn(rows, n, device="cuda").bfloat16() for n in (width, outputs))
    which = torch.randint(-1, len(parts), (rows,), device="cuda", dtype=torch.int32)
    expected = y.double().clone()
    for row, adapter in enumerate(which.tolist()):
        if adapter >= 0:
            down, up = (t.bfloat16().double().cuda() for t in parts[adapter])
            expected[row] += (x[row].double() @ down.T).bfloat16().double() @ up.T
    found = adapters.add(x, y.clone(), adapters.group(grouping, which))
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3
    assert torch.equal(found[which < 0], y[which < 0])
    if int((which >= 0).sum()):
        assert not torch.equal(found, y)
    for row in (0, 8, 74):
        alone = adapters.add(
            x[row : row + 1].contiguous(), y[row : row + 1].clone(), adapters.group(grouping, which[row : row + 1])
        )
        assert torch.equal(alone, found[row : row + 1])
    order = torch.randperm(rows, device="cuda")
    again = adapters.add(x[order], y[order], adapters.group(grouping, which[order].contiguous()))
    assert torch.equal(again, found[order])


def test_wrong_adapters_are_refused(card):
    with pytest.raises(ValueError, match="ranks of up to 256"):
        Adapters(card, random_adapters(64, 64, (300,)))
    with pytest.raises(ValueError, match="do not adapt"):
        Adapters(card, random_adapters(64, 64, (8,)) + random_adapters(64, 72, (8,)))
