"""The native norm: right, the same for every batch, and swapped in only where it behaves the same."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.registry import backend_for
from petal.peer.model.load import norm_like
from torch import nn

BACKEND = backend_for()


class Plain(nn.Module):
    """As Llama writes it."""

    def __init__(self, weight: torch.Tensor, offset: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(weight, requires_grad=False), offset, eps

    def forward(self, x):
        return (self.offset + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize("width", [1, 15, 16, 33, 576, 4096])
@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_equals_float64(width: int, rows: int) -> None:
    x, weight = torch.randn(rows, width), torch.randn(width)
    wide = x.double()
    expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(BACKEND.rms_norm(weight, 1e-5)(x).double(), expected, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    layer, x = BACKEND.rms_norm(torch.randn(577), 1e-6), torch.randn(300, 577)
    whole = layer(x)
    for start, stop in ((0, 1), (5, 22), (100, 300)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_swapped_where_it_behaves_the_same(offset: float) -> None:
    found = norm_like(Plain(torch.randn(64), offset), BACKEND)
    assert found is not None
    x = torch.randn(4, 64)
    torch.testing.assert_close(found(x), Plain(found.weight)(x))


def test_anything_else_stays() -> None:
    assert norm_like(nn.LayerNorm(64), BACKEND) is None
    assert norm_like(Plain(torch.randn(64), offset=0.5), BACKEND) is None
    assert norm_like(nn.Linear(4, 4), BACKEND) is None
