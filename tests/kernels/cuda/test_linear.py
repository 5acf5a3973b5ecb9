"""Products on a card: right against float64, and one bit pattern a row whatever the tiling and the rows beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from petal.kernels.cuda.layout import Weights, fields, interleave, pack
from petal.kernels.cuda.linear import Linear, activations
from petal.kernels.cuda.runtime import runtime
from petal.kernels.cuda.tiling import Tiling, candidates, row_tile
from petal.kernels.formats.base import Tensors
from torch import Tensor

from tests.kernels.cuda.layout_cases import CASES
from tests.kernels.quantized_weights import random_tensors

pytestmark = pytest.mark.cuda
ROWS = (1, 5, 16, 31, 64, 100, 200, 512)
SHAPES = [(1280, 4096), (72, 768), (8, 256), (4104, 1280)]
GUARD = 64  # poisoned values behind an output


@pytest.fixture(scope="module")
def linear() -> Linear:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Linear(runtime(torch.device("cuda", 0)))


def on_card(case: str, shape: tuple[int, int], seed: int = 0) -> tuple[Weights, Tensor]:
    """Packed weights, and the matrix in float64."""
    format = CASES[case][0]
    tensors: Tensors = random_tensors(format, shape, seed)
    if case == "int4 wild":
        noise = torch.Generator().manual_seed(3)
        tensors["scales"] = (torch.randn(tensors["scales"].shape, generator=noise) * 3).exp().clamp(max=6e4).half()
    tensors = {name: t.cuda() for name, t in tensors.items()}
    dense = format.dequantize(tensors, shape)
    return pack(fields(format, tensors, shape)), dense


def tilings(linear: Linear, weights: Weights, rows: int) -> Iterator[Tiling]:
    """All that a shape can use, for formats beside int4 the first two."""
    found = candidates(linear._card, weights.layout, weights.shape[0], weights.depth_blobs, rows)
    yield from found if weights.layout.name == "Int4" else found[:2]


def compile_all(linear: Linear, weights: Weights, rows: tuple[int, ...] = ROWS) -> None:
    """Side by side, before the first product waits for one."""
    for tiling in {tiling for m in rows for tiling in tilings(linear, weights, m)}:
        linear._runtime.programs.start(tiling.program(linear._card, weights.layout))


def product(
    linear: Linear, weights: Weights, x: Tensor, tiling: Tiling | None = None, bias: Tensor | None = None
) -> Tensor:
    rows, outputs = len(x), weights.shape[0]
    out = torch.full((rows * outputs + GUARD,), torch.nan, dtype=torch.bfloat16, device="cuda")
    packed = linear.pack(x, weights)
    linear.product(weights, packed, rows, out, bias=bias, tiling=tiling)
    assert out[rows * outputs :].isnan().all(), "something was written past the end"
    return out[: rows * outputs].view(rows, outputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_are_right_and_rows_have_one_pattern(linear, case, shape):
    weights, dense = on_card(case, shape)
    compile_all(linear, weights)
    everything = torch.randn(max(ROWS), shape[1], device="cuda").bfloat16()
    reference = everything.double() @ dense.T
    first = product(linear, weights, everything)
    for rows in ROWS:
        for tiling in tilings(linear, weights, rows):
            y = product(linear, weights, everything[:rows].contiguous(), tiling)
            error = float((y.double() - reference[:rows]).norm() / reference[:rows].norm())
            assert error < 6e-3, (rows, tiling)
            assert torch.equal(y, first[:rows]), (rows, tiling)


def test_wild_weights_and_rows_have_one_pattern(linear):
    shape, noise = (1280, 4096), torch.Generator("cuda").manual_seed(5)
    tensors = random_tensors(CASES["int4"][0], shape)
    spread = torch.randn(tensors["scales"].shape, generator=torch.Generator().manual_seed(3))
    tensors["scales"] = (spread * 3).exp().clamp(max=6e4).half()
    weights = pack(fields(CASES["int4"][0], {name: t.cuda() for name, t in tensors.items()}, shape))
    x = torch.randn(256, shape[1], device="cuda", generator=noise)
    x = (x * (4 * torch.randn(x.shape, device="cuda", generator=noise)).exp()).bfloat16()
    first = product(linear, weights, x)
    assert first.isfinite().all()
    for rows in (1, 7, 16, 32, 64, 128, 256):
        for tiling in tilings(linear, weights, rows):
            assert torch.equal(product(linear, weights, x[:rows].contiguous(), tiling), first[:rows]), (rows, tiling)


def test_a_row_that_is_no_number_stays_alone(linear):
    weights, _ = on_card("int4", (256, 1024))
    x = torch.randn(64, 1024, device="cuda").bfloat16()
    plain = product(linear, weights, x)
    x[7] = torch.nan
    y = product(linear, weights, x)
    assert y[7].isnan().all()
    kept = torch.arange(64, device="cuda") != 7
    assert torch.equal(y[kept], plain[kept])


@pytest.mark.parametrize("case", ["int4", "int8"])
def test_bias_joins_the_sum(linear, case):
    weights, dense = on_card(case, (1280, 4096))
    x, bias = torch.randn(70, 4096, device="cuda").bfloat16(), 3 * torch.randn(1280, device="cuda")
    reference = x.double() @ dense.T + bias.double()
    outs = [product(linear, weights, x, tiling, bias) for tiling in tilings(linear, weights, 70)]
    assert float((outs[0].double() - reference).norm() / reference.norm()) < 6e-3
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("case", ["int4", "nf4", "int8", "q6_k", "aqlm"])
def test_gated_products_leave_the_next_activations(linear, case):
    shape, format = (1440, 1024), CASES[case][0]
    parts = []
    for seed in (1, 2):
        tensors = {name: t.cuda() for name, t in random_tensors(format, shape, seed).items()}
        if seed == 2 and case == "aqlm":
            tensors["codebooks"] = parts[0][1]["codebooks"]
        parts.append((fields(format, tensors, shape), tensors, format.dequantize(tensors, shape)))
    weights = pack(interleave(parts[0][0], parts[1][0]))
    x = torch.randn(200, shape[1], device="cuda").bfloat16()
    patterns = []
    for rows in (1, 9, 32, 50, 200):
        gate, up = (x[:rows].double() @ dense.T for _, _, dense in parts)
        reference = torch.nn.functional.silu(gate) * up
        tile = row_tile(rows, linear._card)
        for tiling in candidates(linear._card, weights.layout, weights.shape[0], weights.depth_blobs, rows, gated=True):
            out = activations(rows, shape[0], tile, x.device)
            packed = linear.pack(x[:rows].contiguous(), weights)
            linear.product(weights, packed, rows, out, gated=True, tiling=tiling)
            flat = out.transpose(1, 2).flatten(2).flatten(0, 1)
            assert not flat[:, shape[0] :].any()
            y = flat[:rows, : shape[0]]
            assert float((y.double() - reference).norm() / reference.norm()) < 1e-2, (rows, tiling)
            patterns.append(y)
    assert all(torch.equal(y[:1], patterns[0][:1]) for y in patterns)


@pytest.mark.parametrize("case", ["int4", "nf4"])
def test_triton_says_the_same(linear, case):
    """While the compiler works, and where it fails."""
    weights, _ = on_card(case, (1280, 4096))
    everything, bias = torch.randn(200, 4096, device="cuda").bfloat16(), torch.randn(1280, device="cuda")
    for rows in (1, 16, 64, 200):
        x = everything[:rows].contiguous()
        expected = product(linear, weights, x, bias=bias)
        out = torch.full_like(expected, torch.nan)
        linear._twin(weights, linear.pack(x, weights), rows, out, bias)
        assert torch.equal(out, expected), rows


def test_a_product_repeats(linear):
    weights, _ = on_card("int4", (1280, 4096))
    for rows in (8, 64, 128):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        packed = linear.pack(x, weights)
        first = product(linear, weights, x)
        differing = torch.zeros((), dtype=torch.long, device="cuda")
        for index in range(2000):
            out = torch.full_like(first, torch.nan)
            linear.product(weights, packed, rows, out, overlap=bool(index & 1))
            differing += (out != first).any()
        assert int(differing) == 0
