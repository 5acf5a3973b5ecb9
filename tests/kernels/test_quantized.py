"""Products with quantized weights beside float64, whoever computes them."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.adapter import LowRank
from petal.kernels.formats.registry import FORMATS
from petal.kernels.quantized import QuantizedLinear

from .quantized_weights import random_tensors


def test_an_adapter_adds_its_product():
    layer = QuantizedLinear(FORMATS["int4"], random_tensors(FORMATS["int4"], (40, 64)), (40, 64))
    x, down, up = torch.randn(5, 64), torch.randn(3, 64) / 8, torch.randn(40, 3)
    plain = layer(x)
    layer.adapter = LowRank(down, up)
    expected = plain.double() + x.double() @ down.double().T @ up.double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(torch.cat([layer(row) for row in x.split(1)]), layer(x))
    with pytest.raises(ValueError, match="low-rank"):
        LowRank(down, up.T)
