"""The native rotary positions: right, in place, the same for any batch."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.registry import backend_for
from torch import Tensor

rotate = backend_for().rotate


def angles(rows: int, width: int) -> tuple[Tensor, Tensor]:
    turns = torch.rand(rows, width, generator=torch.Generator().manual_seed(rows)) * 6.3
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("width", [2, 10, 64, 130])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_equals_float64(rows: int, width: int) -> None:
    x, (cos, sin) = torch.randn(rows, 3, width), angles(rows, width)
    left, right = x.double().chunk(2, dim=-1)
    expected = x * cos.double()[:, None] + torch.cat((-right, left), dim=-1) * sin.double()[:, None]
    assert rotate(x, cos, sin) is x
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, (cos, sin) = torch.randn(90, 9, 64), angles(90, 64)
    parts = torch.cat([rotate(x[a:b].clone(), cos[a:b], sin[a:b]) for a, b in ((0, 1), (1, 34), (34, 90))])
    assert torch.equal(rotate(x, cos, sin), parts)


def test_rows_with_something_between() -> None:
    whole, (cos, sin) = torch.randn(5, 8, 16), angles(5, 16)
    expected = whole.clone()
    expected[:, :3] = rotate(whole[:, :3].clone(), cos, sin)
    rotate(whole[:, :3], cos, sin)
    assert torch.equal(whole, expected)


def test_angles_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="angles"):
        rotate(torch.zeros(2, 1, 8), *angles(2, 4))
