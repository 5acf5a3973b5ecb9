"""The native activation of gated MLPs: right, wherever a value stands."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.registry import backend_for

silu_gate = backend_for().silu_gate


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (33, 1536), (200, 1001)])
def test_equals_float64(shape: tuple[int, int]) -> None:
    gate, up = 20 * torch.randn(shape), torch.randn(shape)
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    torch.testing.assert_close(silu_gate(gate, up).double(), expected, rtol=1e-6, atol=1e-30)


def test_far_from_zero() -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30])
    assert torch.equal(silu_gate(gate, torch.ones(6)), torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e30]))


def test_a_value_does_not_depend_on_the_others() -> None:
    gate, up = torch.randn(40, 777), torch.randn(40, 777)
    whole = silu_gate(gate, up)
    for start, stop in ((0, 1), (7, 23), (39, 40)):
        assert torch.equal(silu_gate(gate[start:stop], up[start:stop]), whole[start:stop])


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="a gate of"):
        silu_gate(torch.zeros(2, 3), torch.zeros(3, 2))
