"""Formats beside the programs that defined them, and their two layouts beside each other."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from petal.kernels.backend import Linear
from petal.kernels.cpu import layout
from petal.kernels.formats.aqlm import Aqlm
from petal.kernels.formats.base import Format, FormatError, QuantizedTensor, Tensors
from petal.kernels.formats.gguf import TYPES
from petal.kernels.formats.int4 import ROW, Int4, choose_group
from petal.kernels.formats.int8 import Int8
from petal.kernels.formats.nf4 import Nf4, dynamic_map
from petal.kernels.formats.registry import FORMATS
from petal.kernels.registry import backend_for
from torch import Tensor

from ..support.public_formats import AQLM, AQLM_SHAPE, NF4_SHAPES, recorded
from .quantized_weights import random_tensors

SHAPES = [(64, 64), (1, 256), (51, 40), (100, 576), (48, 768)]
GGUF = list(TYPES)


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def linear(format: Format, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None = None) -> Linear:
    return backend_for().linear(QuantizedTensor(format, tensors, shape), bias)


def bits(tensor: Tensor) -> Tensor:
    """What torch can compare."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def fitting(format: Format, shape: tuple[int, int]) -> bool:
    return shape[1] % getattr(format, "block", 8 if isinstance(format, Aqlm) else 1) == 0


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in FORMATS for shape in SHAPES if fitting(FORMATS[name], shape)]
)
def test_unpack_undoes_pack(name: str, shape: tuple[int, int]):
    format = FORMATS[name]
    tensors = random_tensors(format, shape)
    packed = layout.pack(QuantizedTensor(format, tensors, shape))
    again = layout.unpack(format, packed, shape).tensors
    assert all(torch.equal(bits(again[key]), bits(value)) for key, value in tensors.items())
    assert all(tensor.is_contiguous() for tensor in packed.values())
    held = sum(tensor.nbytes for key, tensor in packed.items() if key not in ("values", "outliers", "col_vals"))
    assert held == layout.nbytes(format, shape)
    rows = sum(tensor.nbytes for key, tensor in tensors.items() if key not in ("values", "outliers", "col_vals"))
    assert rows == format.nbytes(shape)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4.375), ("nf4", 4.127), ("q4_1", 5), ("q8_0", 8.5)])
def test_packed_weights_take_little_more_than_their_bits(name: str, bits: float):
    for shape in ((576, 192), (1536, 576), (100, 4096)):
        layer = linear(FORMATS[name], random_tensors(FORMATS[name], shape), shape)
        assert layer.nbytes <= (1.1 if shape[0] % 16 == 0 else 1.2) * bits / 8 * shape[0] * shape[1]


@pytest.mark.parametrize(
    "name", ["bf16", "fp16", "fp32", "int8", "int4", "nf4", "mxfp4", "fp8", "q4_0", "q4_1", "q8_0"]
)
def test_quantizing_loses_what_its_bits_allow(name: str):
    limits = {
        "bf16": 2e-3,
        "fp16": 3e-4,
        "fp32": 0,
        "int8": 0.01,
        "q8_0": 0.01,
        "q4_0": 0.11,
        "q4_1": 0.09,
        "fp8": 0.03,
    }
    limits["mxfp4"] = 0.14
    weight = weights((96, 640))
    format = FORMATS[name]
    tensors = format.quantize(weight)
    dense = format.dequantize(tensors, (96, 640))
    error = float((dense - weight).norm() / weight.norm())
    assert error <= limits.get(name, 0.11)
    assert error > limits.get(name, 0.11) / 10 or name == "fp32"


def test_floats_of_four_bits_are_the_standards():
    """Codes, scales and the order of nibbles, by the tables of OCP's specification."""
    format, codes = FORMATS["mxfp4"], torch.arange(16, dtype=torch.uint8).repeat(2)
    tensors = {"blocks": (codes[0::2] | codes[1::2] << 4).view(1, 1, 16), "scales": torch.tensor([[129]]).byte()}
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert format.dequantize(tensors, (1, 32)).tolist() == [[4.0 * v for v in values * 2]]
    again = format.quantize(format.dequantize(tensors, (1, 32)))
    assert torch.equal(again["scales"], tensors["scales"])
    assert torch.equal(format.dequantize(again, (1, 32)), format.dequantize(tensors, (1, 32)))
    for shape, wrong in (((1, 40), tensors), ((1, 32), tensors | {"scales": torch.tensor([[255]]).byte()})):
        with pytest.raises(FormatError, match="mxfp4"):
            format.check(wrong, shape)


def test_floats_of_eight_bits_have_scales_for_blocks():
    format, shape = FORMATS["fp8"], (200, 320)
    weight = weights(shape) * torch.linspace(-9, 9, 200).exp()[:, None]
    tensors = format.quantize(weight)
    assert tensors["weight_scale_inv"].shape == (2, 3)
    dense = format.dequantize(tensors, shape)
    expected = tensors["weight"].double()
    expected[128:, 256:] *= tensors["weight_scale_inv"][1, 2].double()
    assert torch.equal(dense[128:, 256:], expected[128:, 256:])
    poisoned = tensors | {"weight": tensors["weight"].clone()}
    poisoned["weight"].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(FormatError, match="not finite"):
        format.check(poisoned, shape)
    with pytest.raises(FormatError, match="share scales"):
        QuantizedTensor(format, tensors, shape).rows(torch.tensor([1]))


def test_rows_are_those_of_the_whole():
    for name in ("int8", "int4", "q8_0", "q4_1", "bf16", "aqlm", "mxfp4"):
        format, shape, which = FORMATS[name], (40, 576), torch.tensor([3, 39, 0, 3])
        matrix = QuantizedTensor(format, random_tensors(format, shape), shape)
        assert torch.equal(matrix.rows(which, torch.float64), matrix.dense(torch.float64)[which])
        handle = backend_for().linear(matrix)
        rounded = (lambda t: t.bfloat16().float()) if name == "mxfp4" else (lambda t: t)  # held dense
        assert torch.equal(handle.dense(), rounded(matrix.dense()))
        assert torch.equal(handle.rows(which), rounded(matrix.rows(which)))


@pytest.mark.parametrize("name", GGUF)
def test_gguf_types_as_the_public_package_reads_them(name: str):
    format, shape = FORMATS[name], (7, 768)
    blocks = random_tensors(format, shape)["blocks"]
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    ours = format.dequantize({"blocks": blocks}, shape)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_gguf_types_as_the_public_package_writes_them(name: str):
    weight = weights((9, 96))
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(FORMATS[name].quantize(weight)["blocks"].numpy(), theirs)


@pytest.mark.parametrize("place", range(len(NF4_SHAPES)))
def test_nf4_has_the_bytes_of_bitsandbytes(place: int):
    shape, theirs = NF4_SHAPES[place], recorded(f"nf4 {place}")
    ours = Nf4().quantize(theirs["dense"].float())
    assert all(torch.equal(ours[key], theirs[key]) for key in ("weight", "nested_absmax", "nested_quant_map"))
    assert float(ours["offset"]) == float(theirs["offset"])
    # Its CPU build rounds scales beside the middle of two codes to either, its CUDA build as we do.
    apart = (ours["absmax"].int() - theirs["absmax"].int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01
    again = Nf4().dequantize(ours | {"absmax": theirs["absmax"]}, shape)
    torch.testing.assert_close(again.float(), theirs["decoded"], rtol=1e-6, atol=1e-8)
    spoilt = Nf4().quantize(theirs["dense"].float().flip(1))
    assert not torch.equal(spoilt["weight"], theirs["weight"])  # negative control


def test_the_code_of_scales_is_sorted_and_whole():
    code = dynamic_map()
    assert code.shape == (256,)
    assert bool((code.diff() > 0).all())
    assert (code[0], code[-1]) == (pytest.approx(-0.99297, abs=1e-4), 1)


@pytest.mark.parametrize("name", AQLM)
def test_aqlm_decodes_as_the_public_package_does(name: str):
    tensors = recorded(name)
    decoded = tensors.pop("decoded")
    ours = FORMATS[name].dequantize(tensors, AQLM_SHAPE)
    torch.testing.assert_close(ours.float(), decoded, rtol=1e-5, atol=1e-6)


def test_spqr_words_by_the_layout_of_its_release():
    """One tile by hand, bit by bit."""
    spqr = FORMATS["spqr"]
    numbers = torch.tensor([0.5, 0.25, 1.0, 2.0]).half()  # s_s, z_s, s_z, z_z
    bits = b"".join(int(n).to_bytes(2, "little") for n in numbers.view(torch.int16))
    words = []
    for row in range(16):
        word = (row % 8) | (7 - row % 8) << 3
        for column in range(16):
            word |= ((row + column) % 8) << 3 * (column + 2)
        words.append(word | bits[row // 2] << 54)
    outlier = int(torch.tensor([3.5]).half().view(torch.int16)) << 16 | 5
    tensors = {
        "dense_weights": torch.tensor(words),
        "row_offsets": torch.tensor([0] * 3 + [1] * 14, dtype=torch.int32),
        "col_vals": torch.tensor([outlier], dtype=torch.int32),
    }
    dense = spqr.dequantize(tensors, (16, 16))
    for row in range(16):
        scale, zero = 0.5 * (row % 8 - 1.0), 0.25 * (7 - row % 8 - 2.0)
        for column in range(16):
            residual = 3.5 if (row, column) == (2, 5) else 0
            assert dense[row, column] == scale * ((row + column) % 8 - zero) + residual


def test_spqr_columns_go_back_to_their_places():
    format, shape = FORMATS["spqr"], (20, 50)
    tensors = random_tensors(format, shape)
    plain = format.dequantize(tensors, shape)
    order = torch.randperm(50)
    pairs = order.view(-1, 2)
    tensors["in_perm"] = (pairs[:, 1] << 16 | pairs[:, 0]).int()
    moved = format.dequantize(tensors, shape)
    assert torch.equal(moved[:, order], plain)
    assert not torch.equal(moved, plain)


def test_int8_keeps_outlier_columns():
    weight = weights((64, 200))
    weight[:, 17] *= 40
    tensors = Int8().quantize(weight)
    assert tensors["outliers"].tolist() == [17]
    dense = Int8().dequantize(tensors, (64, 200))
    assert float((dense - weight).norm() / weight.norm()) < 4e-3
    spoilt = Int8(threshold=1e9).quantize(weight)
    dense = Int8().dequantize(spoilt, (64, 200))
    assert float((dense - weight)[:, :17].norm() / weight[:, :17].norm()) > 4e-2  # negative control


@pytest.mark.parametrize("group", [32, 64, 128, 192, ROW, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_at_every_granularity(group: int | None, symmetric: bool):
    format, shape = Int4(group, symmetric), (40, 576)
    tensors = format.quantize(weights(shape))
    groups = tensors["scales"].shape[1]
    assert groups == {32: 18, 64: 9, 128: 5, 192: 3, ROW: 1, None: groups}[group]
    assert not symmetric or bool((tensors["zeros"] == 8).all())
    dense = format.dequantize(tensors, shape)
    assert 0.05 < float((dense - weights(shape)).norm() / weights(shape).norm()) < 0.2


def test_int4_takes_finer_groups_where_ranges_differ():
    even = torch.rand(64, 512) - 0.5
    uneven = even * torch.logspace(-2, 0, 8).repeat_interleave(64)
    assert (choose_group(even), choose_group(uneven)) == (256, 64)


def _without(name: str):
    return lambda tensors: tensors.pop(name)


def _set(name: str, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _poke(name: str, place: int, value: float):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[place] = value

    return change


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("int4", _without("scales"), "int4"),
        ("int4", _set("scales", lambda t: t.float()), "scales of int4 weights is torch.float32"),
        ("int4", _set("codes", lambda t: t[:, :-1]), "depth"),
        ("int4", _poke("zeros", 3, 16), "zero of int4 weights is 16"),
        ("int4", _poke("scales", 3, float("inf")), "not finite"),
        ("int8", _set("codes", lambda t: t[:-1]), "codes of int8"),
        (
            "int8",
            lambda t: t.update(outliers=torch.tensor([5]).int(), values=torch.ones(40, 1).bfloat16()),
            "zero in out",
        ),
        ("int8", _poke("scales", 0, float("nan")), "not finite"),
        ("int8", lambda t: t.update(outliers=torch.tensor([576]).int(), values=torch.ones(40, 1).bfloat16()), "575"),
        ("nf4", _without("nested_absmax"), "lack nested_absmax"),
        ("nf4", _set("weight", lambda t: t[:-1]), "weight of nf4"),
        ("nf4", _set("absmax", lambda t: t.float()), "absmax of nf4"),
        ("aqlm", _without("scales"), "lack scales"),
        ("aqlm", _set("codebooks", lambda t: t[:, :-1]), "codebooks of aqlm"),
        ("spqr", _poke("row_offsets", -1, 10**6), "row_offsets"),
        ("spqr", _set("col_vals", lambda t: t | 0xFFFF), "column 65535"),
        ("q4_1", _set("blocks", lambda t: t[:, 1:]), "blocks of q4_1"),
        ("q8_0", lambda t: t.update(more=t["blocks"]), "have no more"),
    ],
)
def test_wrong_tensors_are_named(name: str, spoil, message: str):
    format = FORMATS[name]
    tensors = random_tensors(format, (40, 576))
    linear(format, tensors, (40, 576))
    spoil(tensors)
    with pytest.raises(FormatError, match=message):
        linear(format, tensors, (40, 576))


def test_a_code_past_its_codebook_is_named():
    tensors = random_tensors(Aqlm(2, 7), (8, 64))
    tensors["codes"][3, 4, 1] = -1
    with pytest.raises(FormatError, match="255, a codebook has 128"):
        Aqlm(2, 7).check(tensors, (8, 64))


def test_wrong_matrices_are_named():
    with pytest.raises(FormatError, match="256 columns, not 576"):
        linear(FORMATS["q4_k"], {}, (40, 576))
    with pytest.raises(FormatError, match="petal quantize"):
        FORMATS["aqlm"].quantize(weights((8, 8)))
    for wrong in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int8), torch.full((2, 2), torch.nan)):
        with pytest.raises(FormatError):
            FORMATS["int8"].quantize(wrong)
    with pytest.raises(ValueError, match="bias"):
        linear(FORMATS["bf16"], {"weight": torch.zeros(4, 8).bfloat16()}, (4, 8), torch.zeros(3))
