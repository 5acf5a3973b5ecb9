"""Blobs hold a checkpoint's weights, in the places that the kernels read."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.layout import dense_rows, fields, interleave, pack
from petal.kernels.formats.int4 import Int4
from petal.kernels.formats.int8 import Int8
from petal.kernels.formats.registry import FORMATS

from tests.kernels.cuda.reading import dense
from tests.kernels.quantized_weights import random_tensors

# The largest share of a weight that rounding may take: of codes times numbers, each rounded to bfloat16.
CASES = {
    "bf16": (FORMATS["bf16"], "Bf16"),
    "int4": (FORMATS["int4"], "Int4"),
    "int4 by 128": (Int4(128), "Int4"),
    "int4 by 32": (Int4(32), "Int4Group32"),
    "nf4": (FORMATS["nf4"], "Nf4"),
    "int8": (FORMATS["int8"], "Int8"),
    "q4_0": (FORMATS["q4_0"], "Q4_0"),
    "q4_1": (FORMATS["q4_1"], "Q4_1"),
    "q8_0": (FORMATS["q8_0"], "Q8_0"),
    "q4_k": (FORMATS["q4_k"], "Q4_1"),
    "q5_k": (FORMATS["q5_k"], "Q5_K"),
    "q6_k": (FORMATS["q6_k"], "Q6_K"),
    "int8 with outliers": (Int8(threshold=1.2, most_outliers=0.02), "Int8"),
    "aqlm": (FORMATS["aqlm"], "Aqlm2x8"),
    "aqlm-1x16": (FORMATS["aqlm-1x16"], "Aqlm1x16"),
}


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
