"""Products on a card: right against float64, and one bit pattern a row whatever the tiling and the rows beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
    linear: Linear,
    weights: Weights,
    x: Tensor,
    tiling: Tiling | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    rows, outputs = len(x), weights.shape[0]
    out = torch.full((rows * outputs + GUARD,), torch.nan, dtype=dtype, device="cuda")
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


@pytest.mark.parametrize("case", ["int4", "mxfp4", "fp8", "spqr", "q4_k"])
def test_wild_weights_and_rows_have_one_pattern(linear, case):
    """Scales e^N(0, 3), rows times e^N(0, 4)."""
    shape, noise, format = (1280, 4096), torch.Generator("cuda").manual_seed(5), CASES[case][0]
    taken = fields(format, {name: t.cuda() for name, t in random_tensors(format, shape).items()}, shape)
    spread = (3 * torch.randn(taken.rows["scale"].shape, device="cuda", generator=noise)).exp()
    weights = pack(replace(taken, rows={**taken.rows, "scale": taken.rows["scale"] * spread}))
    x = torch.randn(256, shape[1], device="cuda", generator=noise)
    x = (x * (4 * torch.randn(x.shape, device="cuda", generator=noise)).exp()).bfloat16()
    compile_all(linear, weights, (1, 7, 16, 32, 64, 128, 256))
    first = product(linear, weights, x)
    assert first.isfinite().all()
    for rows in (1, 7, 16, 32, 64, 128, 256):
        for tiling in tilings(linear, weights, rows):
            assert torch.equal(product(linear, weights, x[:rows].contiguous(), tiling), first[:rows]), (rows, tiling)


@pytest.mark.parametrize("shape", [(64, 100), (70, 33), (520, 577)], ids=str)
def test_blocks_of_nf4_may_go_on_from_row_to_row(linear, shape):
    weights, dense = on_card("nf4", shape)
    assert weights.layout.name == "Nf4Across"
    x = torch.randn(200, shape[1], device="cuda").bfloat16()
    reference = x.double() @ dense.T
    first = product(linear, weights, x)
    assert float((first.double() - reference).norm() / reference.norm()) < 6e-3
    for rows in (1, 16, 31, 64):
        assert torch.equal(product(linear, weights, x[:rows].contiguous()), first[:rows])


def test_columns_of_spqr_may_have_an_order_of_their_own(linear):
    shape, format = (520, 1000), CASES["spqr"][0]
    tensors = random_tensors(format, shape)
    order = torch.randperm(1000).int()
    tensors = {name: t.cuda() for name, t in {**tensors, "in_perm": order[0::2] | order[1::2] << 16}.items()}
    weights, dense = pack(fields(format, tensors, shape)), format.dequantize(tensors, shape)
    x = torch.randn(40, 1000, device="cuda").bfloat16()
    reference = x.double() @ dense.T
    assert float((product(linear, weights, x).double() - reference).norm() / reference.norm()) < 6e-3


@pytest.mark.parametrize("case", ["int4", "int8"])
def test_sums_in_float32_round_to_those_in_bfloat16(linear, case):
    """What an LM head wants."""
    for shape in ((1280, 4096), (72, 768), (1001, 512)):
        weights, dense = on_card(case, shape)
        x, bias = torch.randn(150, shape[1], device="cuda").bfloat16(), torch.randn(shape[0], device="cuda")
        for rows in (1, 16, 40, 64, 150):
            some = x[:rows].contiguous()
            for tiling in tilings(linear, weights, rows):
                wide = product(linear, weights, some, tiling, bias, torch.float32)
                assert torch.equal(wide.bfloat16(), product(linear, weights, some, tiling, bias))
        reference = x.double() @ dense.T + bias.double()
        error = float(
            (product(linear, weights, x, None, bias, torch.float32).double() - reference).norm() / reference.norm()
        )
        assert error < 4e-3


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


@pytest.mark.parametrize("case", ["int4", "nf4", "int8", "q6_k", "aqlm", "mxfp4", "fp8", "spqr"])
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
    for rows, dtype in ((1, torch.float32), (16, torch.bfloat16), (64, torch.float32), (200, torch.bfloat16)):
        x = everything[:rows].contiguous()
        expected = product(linear, weights, x, bias=bias, dtype=dtype)
        out = torch.full_like(expected, torch.nan)
        linear._twin(weights, linear.pack(x, weights), rows, out, bias)
        assert torch.equal(out, expected), rows


@pytest.mark.parametrize("case", ["int4", "spqr", "aqlm"])
def test_a_product_repeats(linear, case):
    """Ten thousand times, half of them overlapping, over whole and split tilings."""
    weights, _ = on_card(case, (1280, 4096))
    for rows in (8, 32, 64, 128):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        packed, first = linear.pack(x, weights), product(linear, weights, x)
        found = candidates(linear._card, weights.layout, 1280, weights.depth_blobs, rows)
        both = [next(t for t in found if t.split), next(t for t in found if not t.split)]
        differing = torch.zeros((), dtype=torch.long, device="cuda")
        out = torch.empty_like(first)
        for index in range(2500 // len(both) + 1):
            for tiling in both:
                out.fill_(torch.nan)
                linear.product(weights, packed, rows, out, tiling=tiling, overlap=bool(index & 1))
                differing += (out != first).any()
        assert int(differing) == 0
