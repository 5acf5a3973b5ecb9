"""Handles whose weights are joined say what they said apart; products are read out of the blobs in plain torch."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.cuda.layout import Weights
from petal.kernels.cuda.weights import CudaLinear, beside, interleaved
from petal.kernels.formats.base import FormatError, QuantizedTensor
from petal.kernels.formats.int8 import Int8
from torch import Tensor

from tests.kernels.cuda.layout_cases import CASES
from tests.kernels.cuda.reading import dense
from tests.kernels.quantized_weights import random_tensors

WIDTH = 512
JOINED = [name for name in CASES if name not in ("int8 with outliers", "aqlm", "aqlm-1x16")]


class Products:
    """Stands in for the card's."""

    def prepare(self, weights: Weights, gated: bool = False) -> None:
        assert gated == (weights.shape[0] == 2 * 128)

    def pack(self, x: Tensor, weights: Weights) -> Tensor:
        return x

    def product(self, weights: Weights, x: Tensor, rows: int, y: Tensor, bias: Tensor | None, wait: bool) -> None:
        found = x.double() @ dense(weights).T
        y.copy_(found if bias is None else found + bias)


def handle(name: str, out: int, seed: int, biased: bool = False) -> CudaLinear:
    format = CASES[name][0]
    tensors = random_tensors(format, (out, WIDTH), seed)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(seed)) if biased else None
    weight = QuantizedTensor(format, tensors, (out, WIDTH))
    return CudaLinear(Products(), torch.device("cpu"), weight, bias)  # type: ignore[arg-type]


def rows() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("name", "biased"), [("int4", False), *((name, True) for name in JOINED)])
def test_matrices_beside_each_other(name: str, biased: bool) -> None:
    """Queries, keys and values of one product: a share of the memory each, and the results that they had."""
    sizes = (128, 64, 40)
    apart = [handle(name, out, seed, biased and seed != 1) for seed, out in enumerate(sizes)]
    joined = [handle(name, out, seed, biased and seed != 1) for seed, out in enumerate(sizes)]
    held = beside(joined)
    assert held.weights.shape == (sum(sizes), WIDTH)
    assert (held.bias is not None) == biased
    which = torch.tensor([5, 0, 39])
    for mine, theirs in zip(joined, apart, strict=True):
        assert mine.packed is held.weights
        torch.testing.assert_close(mine(rows()), theirs(rows()), rtol=1e-6, atol=1e-6)
        assert torch.equal(mine.dense(), theirs.dense())
        assert torch.equal(mine.rows(which), theirs.rows(which))
    if name != "spqr":  # whose blobs are as long as the list of most outliers
        assert sum(mine.nbytes for mine in joined) == sum(theirs.nbytes for theirs in apart) == held.weights.nbytes


@pytest.mark.parametrize("name", JOINED)
def test_gates_beside_their_ups(name: str) -> None:
    apart, joined = ([handle(name, 128, seed) for seed in (1, 2)] for _ in range(2))
    weights = interleaved(*joined)
    assert weights.shape == (256, WIDTH)
    for mine, theirs in zip(joined, apart, strict=True):
        torch.testing.assert_close(mine(rows()), theirs(rows()), rtol=1e-6, atol=1e-6)
        assert torch.equal(mine.dense(), theirs.dense())


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("int4", 64), ("nf4", 64)], "different layouts"),
        ([("int4", 40), ("int4", 64)], "ends within a blob"),
        ([("aqlm", 64), ("aqlm", 64)], "codebooks"),
        ([("int8 with outliers", 64), ("int8 with outliers", 64)], "outlier columns"),
    ],
    ids=["two layouts", "odd outputs", "codebooks", "outliers"],
)
def test_what_cannot_be_joined_stays_as_it_was(parts: list[tuple[str, int]], said: str) -> None:
    handles, apart = ([handle(name, out, seed) for seed, (name, out) in enumerate(parts)] for _ in range(2))
    with pytest.raises(FormatError, match=said):
        beside(handles)
    for mine, theirs in zip(handles, apart, strict=True):
        assert torch.equal(mine.dense(), theirs.dense())
        assert mine.packed.shape[0] == mine.out_features


def test_gates_with_biases_stay_apart() -> None:
    with pytest.raises(FormatError, match="biases"):
        interleaved(handle("int4", 128, 1, biased=True), handle("int4", 128, 2))


def test_int8_without_outliers_is_joined() -> None:
    """Whether columns stand out, the weights decide."""
    format = Int8()
    weight = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    made = QuantizedTensor(format, format.quantize(weight), (64, WIDTH))
    both = [CudaLinear(Products(), torch.device("cpu"), made) for _ in range(2)]  # type: ignore[arg-type]
    assert beside(both).weights.shape == (128, WIDTH)
    assert torch.equal(both[0].dense(), both[1].dense())
