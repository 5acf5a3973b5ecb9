"""Blobs hold a checkpoint's weights, in the places that the kernels read."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.layout import dense_rows, fields, interleave, pack
from petal.kernels.formats.registry import FORMATS

from tests.kernels.cuda.layout_cases import CASES
from tests.kernels.cuda.reading import dense
from tests.kernels.quantized_weights import random_tensors


@pytest.mark.parametrize("shape", [(64, 512), (72, 768), (8, 256), (200, 1280)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_holds_what_the_checkpoint_says(case, shape):
    format, layout = CASES[case]
    tensors = random_tensors(format, shape)
    taken = fields(format, tensors, shape)
    assert taken.layout is LAYOUTS[layout]
    packed = pack(taken)
    assert packed.blobs.shape == (-(-shape[0] // 64), taken.depth // 64, LAYOUTS[layout].bytes)
    assert (packed.extension is not None) == (case == "int8 with outliers")
    expected = format.dequantize(tensors, shape)
    off = (dense(packed) - expected).abs()
    largest = expected.abs().amax(1, keepdim=True).clamp(min=1e-30)
    # Rounding takes no larger share of a weight: codes times numbers, each rounded to bfloat16.
    assert float((off / largest).max()) < 2**-7
    assert float(off.norm() / expected.norm()) < 4e-3


def test_a_code_in_a_wrong_place_is_seen():
    format, shape = FORMATS["int4"], (64, 512)
    tensors = random_tensors(format, shape)
    packed = pack(fields(format, tensors, shape))
    before = dense(packed)
    packed.blobs[0, 3, 700] ^= 16
    assert int((dense(packed) != before).sum()) == 1


def test_what_no_layout_holds_becomes_bfloat16():
    format, shape = FORMATS["nf4"], (24, 100)  # blocks go on from row to row
    tensors = random_tensors(format, shape)
    packed = pack(fields(format, tensors, shape))
    expected = format.dequantize(tensors, shape)
    assert packed.layout is LAYOUTS["Bf16"]
    assert torch.equal(dense(packed), expected.bfloat16().double())


def test_rows_of_a_table_are_found():
    weight = torch.randn(200, 768).bfloat16()
    which = torch.tensor([0, 199, 63, 64, 17, 8, 17])
    assert torch.equal(dense_rows(pack(fields(FORMATS["bf16"], {"weight": weight}, (200, 768))), which), weight[which])


@pytest.mark.parametrize("name", ["int4", "nf4", "int8", "q6_k", "aqlm"])
def test_gates_lie_beside_their_ups(name):
    format, shape = FORMATS[name], (40, 512)
    first, second = (fields(format, random_tensors(format, shape, seed), shape) for seed in (1, 2))
    if first.codebooks is not None:
        second = type(second)(second.layout, second.width, second.rows, first.codebooks)
    both = dense(pack(interleave(first, second))).unflatten(0, (-1, 2, 8))
    assert both.shape == (8, 2, 8, 512)
    gates, ups = (both[:, i].flatten(0, 1) for i in range(2))
    assert torch.equal(gates[:40], dense(pack(first)))
    assert torch.equal(ups[:40], dense(pack(second)))
    if name != "int8":
        assert not gates[40:].any()
