"""The largest values of each row against a stable sort."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.registry import backend_for

topk = backend_for().topk


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 5, 5), (3, 64, 1), (7, 1000, 200), (2, 49152, 128), (4, 65, 33)]
)
@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal", "few"])
def test_equals_a_stable_sort(rows: int, width: int, count: int, order: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    if order in ("rising", "falling"):
        x = x.sort(dim=1, descending=order == "falling").values
    elif order != "random":
        x = x.round() if order == "few" else torch.zeros_like(x)
    values, columns = topk(x, count)
    expected = torch.sort(x, dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(columns, expected.indices[:, :count])


def test_infinities() -> None:
    x = torch.full((1, 300), -torch.inf)
    x[0, 200:210] = torch.arange(10.0)
    x[0, 7] = torch.inf
    values, columns = topk(x, 12)
    assert values[0, :2].tolist() == [torch.inf, 9.0]
    assert columns[0, :11].tolist() == [7, *range(209, 199, -1)]
    assert columns[0, 11] == 0


def test_refuses_what_it_cannot_do() -> None:
    for x, count in ((torch.zeros(4), 1), (torch.zeros(2, 3), 4), (torch.zeros(2, 3), 0), (torch.zeros(2, 9000), 257)):
        with pytest.raises(ValueError, match="are possible"):
            topk(x, count)
