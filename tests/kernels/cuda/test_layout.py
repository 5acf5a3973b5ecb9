"""Blobs hold a checkpoint's weights, in the places that the kernels read."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.layout import beside, dense_rows, fields, interleave, pack
from petal.kernels.formats.base import FormatError
from petal.kernels.formats.registry import FORMATS
from petal.kernels.formats.spqr import join_outliers

from tests.kernels.cuda.layout_cases import CASES
from tests.kernels.cuda.reading import dense
from tests.kernels.quantized_weights import random_tensors


@pytest.mark.parametrize("shape", [(64, 512), (72, 768), (8, 256), (200, 1280)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_holds_what_the_checkpoint_says(case, shape):
    format, layout = CASES[case]
    tensors = random_tensors(format, shape)
    taken = fields(format, tensors, shape)
    packed = pack(taken)
    assert packed.layout.name.partition("<")[0] == layout
    assert packed.blobs.shape == (-(-shape[0] // 64), taken.depth // 64, packed.layout.bytes)
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


@pytest.mark.parametrize("shape", [(24, 100), (70, 33), (9, 577), (64, 4100)], ids=str)
def test_blocks_of_nf4_may_go_on_from_row_to_row(shape):
    format = FORMATS["nf4"]
    tensors = random_tensors(format, shape)
    packed = pack(fields(format, tensors, shape))
    expected = format.dequantize(tensors, shape)
    assert packed.layout is LAYOUTS["Nf4Across"]
    assert float((dense(packed) - expected).norm() / expected.norm()) < 4e-3


def test_columns_of_spqr_may_have_an_order_of_their_own():
    format, shape = FORMATS["spqr"], (40, 500)
    tensors = random_tensors(format, shape)
    order = torch.randperm(500).int()
    tensors["in_perm"] = order[0::2] | order[1::2] << 16
    packed = pack(fields(format, tensors, shape))
    expected = format.dequantize(tensors, shape)
    assert torch.equal(packed.columns, order)
    assert float((dense(packed) - expected).norm() / expected.norm()) < 4e-3


def test_what_no_layout_holds_becomes_bfloat16():
    format, shape = FORMATS["spqr"], (24, 100)
    tensors = random_tensors(format, shape)
    every = torch.arange(100).repeat(24)
    tensors["row_offsets"] = torch.arange(0, 2401, 100, dtype=torch.int32)
    tensors["col_vals"] = join_outliers(every, torch.randn(2400))
    packed = pack(fields(format, tensors, shape))
    expected = format.dequantize(tensors, shape)
    assert packed.layout is LAYOUTS["Bf16"]
    assert torch.equal(dense(packed), expected.bfloat16().double())


@pytest.mark.parametrize("name", ["q5_0", "iq4_xs"])
def test_types_of_gguf_without_a_layout_become_bfloat16(name):
    format, shape = FORMATS[name], (24, 512)
    tensors = random_tensors(format, shape)
    packed = pack(fields(format, tensors, shape))
    assert packed.layout is LAYOUTS["Bf16"]
    assert torch.equal(dense(packed), format.dequantize(tensors, shape, torch.float32).bfloat16().double())


def test_matrices_with_columns_in_the_same_order_are_one_product():
    format, shape = FORMATS["spqr"], (64, 500)
    order = torch.randperm(500).int()
    parts, dense_parts = [], []
    for seed, columns in ((1, order), (2, order), (3, order.flip(0))):
        tensors = random_tensors(format, shape, seed)
        tensors["in_perm"] = columns[0::2] | columns[1::2] << 16
        parts.append(fields(format, tensors, shape))
        dense_parts.append(format.dequantize(tensors, shape))
    both, expected = dense(pack(beside(parts[:2]))), torch.cat(dense_parts[:2])
    assert float((both - expected).norm() / expected.norm()) < 4e-3
    for join in (beside, lambda two: interleave(*two)):
        with pytest.raises(FormatError, match="columns in orders"):
            join(parts[1:])


def test_rows_of_a_table_are_found():
    weight = torch.randn(200, 768).bfloat16()
    which = torch.tensor([0, 199, 63, 64, 17, 8, 17])
    assert torch.equal(dense_rows(pack(fields(FORMATS["bf16"], {"weight": weight}, (200, 768))), which), weight[which])


@pytest.mark.parametrize("name", ["int4", "nf4", "int8", "q6_k", "aqlm", "spqr", "fp8", "mxfp4"])
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
