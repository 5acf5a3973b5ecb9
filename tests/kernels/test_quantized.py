"""Products with quantized weights beside float64, whoever computes them."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.adapter import LowRank
from petal.kernels.cpu import build as native
from petal.kernels.cpu.linear import PackedLinear
from petal.kernels.cpu.select import KERNELS, Device, device_of, select
from petal.kernels.formats.aqlm import Aqlm
from petal.kernels.formats.base import Format
from petal.kernels.formats.int4 import ROW, Int4
from petal.kernels.formats.nf4 import Nf4
from petal.kernels.formats.registry import FORMATS
from petal.kernels.quantized import QuantizedLinear
from torch import Tensor

from .conftest import fresh_kernels
from .quantized_weights import random_tensors

ROWS = [1, 2, 7, 16, 17, 64, 255, 512]
SHAPES = [(64, 64), (51, 40), (300, 576), (33, 51), (96, 768), (40, 1544)]
VARIANTS = {**FORMATS, "int4-32": Int4(32), "int4-row": Int4(ROW), "int4-192": Int4(192), "aqlm-3x5": Aqlm(3, 5)}
TOLERANCE = 3e-3  # relative, Frobenius

DECODED = [name for name in VARIANTS if name.startswith(("aqlm", "spqr", "fp16")) or name.endswith("_k")]
INTEGER = [name for name in VARIANTS if name.startswith(("int", "nf4")) or name in ("q4_0", "q4_1", "q8_0")]

every_format = pytest.mark.parametrize("name", VARIANTS)
every_code = pytest.mark.parametrize("code", ["native", "portable", "torch"], indirect=True)


def layers_of(format: Format, shape: tuple[int, int], count: int = 1) -> list[QuantizedLinear]:
    torch.manual_seed(0)
    return [
        QuantizedLinear(format, random_tensors(format, shape, i), shape, torch.randn(shape[0])) for i in range(count)
    ]


def shapes_of(format: Format) -> list[tuple[int, int]]:
    unit = getattr(format, "block", 8 if isinstance(format, Aqlm) else 1)
    return [shape for shape in SHAPES if shape[1] % unit == 0]


def reference(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return x.double() @ layer.dense(torch.float64).T + layer.bias[: layer.out_features].double()


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@every_format
def test_close_to_float64(name: str, device: str):
    """Two layers of a shape in one process: none reads the other's weights."""
    for shape in shapes_of(VARIANTS[name]):
        layers = [layer.to(device) for layer in layers_of(VARIANTS[name], shape, 2)]
        for rows in ROWS:
            x = torch.randn(rows, shape[1], device=device)
            for layer in layers:
                assert error(layer(x), reference(layer, x)) <= TOLERANCE
            assert error(layers[0](x), reference(layers[1], x)) > 0.1  # negative control


@every_code
@pytest.mark.parametrize("name", DECODED)
def test_as_the_bf16_layer_of_the_same_weights(code: str, name: str):
    """Bit for bit, whatever the number of rows: decoded weights are rounded once, sums have that layer's order."""
    for shape in shapes_of(VARIANTS[name])[-2:]:
        (layer,) = layers_of(VARIANTS[name], shape)
        dense = layer.dense().bfloat16()
        plain = PackedLinear(dense, layer.bias[: shape[0]], torch.bfloat16)
        for rows in (1, 16, 33, 70):
            x = torch.randn(rows, shape[1])
            if code == "torch":
                assert error(layer(x), plain(x).double()) < 1e-5
            else:
                # Decoders may round the last bit of a product otherwise than torch: then a weight in thousands differs.
                torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INTEGER)
def test_integer_products_are_closer_than_bf16(name: str):
    """Weights are used as they are; rows in 12 bits where codes have 4, else in 16."""
    for shape in [(64, 64), (300, 576), (40, 1536)]:
        (layer,) = layers_of(VARIANTS[name], shape)
        x = torch.randn(40, shape[1])
        x[:, 3] *= 100  # as activations have it
        expected = reference(layer, x)
        rounded = PackedLinear(layer.dense().bfloat16(), layer.bias[: shape[0]], torch.bfloat16)(x)
        assert error(layer(x), expected) < (3e-4 if name in ("int8", "q8_0") else 1.6e-3)
        assert error(rounded, expected) > error(layer(x), expected)


@pytest.mark.parametrize("name", INTEGER)
def test_integer_products_have_the_same_bits_on_every_processor(name: str, monkeypatch: pytest.MonkeyPatch):
    """With the matrix unit, without it, and without integer instructions: exact sums have no order."""
    (layer,) = layers_of(VARIANTS[name], (300, 576))
    x = torch.randn(40, 576)
    expected = layer(x)
    for variables in ({"PETAL_NATIVE": "portable"}, {"CC": "cc -mno-avx512vnni"}, {"CC": "cc -mno-avx512f -Wno-psabi"}):
        with monkeypatch.context() as patch, fresh_kernels():
            for key, value in variables.items():
                patch.setenv(key, value)
            if native.library() is None:
                pytest.skip("no C compiler for this processor")
            (again,) = layers_of(VARIANTS[name], (300, 576))
            assert torch.equal(again(x), expected)
            assert torch.equal(torch.cat([again(row) for row in x.split(1)]), expected)


@every_code
@every_format
def test_row_does_not_depend_on_the_others(code: str, name: str):
    shape = shapes_of(VARIANTS[name])[-1]
    (layer,) = layers_of(VARIANTS[name], shape)
    x = torch.randn(70, shape[1])
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in (2, 7, 16, 17, 32, 33, 70):
        assert torch.equal(torch.cat([layer(part) for part in x.split(rows)]), alone)
    assert torch.equal(layer(x.flip(0)).flip(0), alone)


@pytest.mark.parametrize("code", ["native", "portable"], indirect=True)
@pytest.mark.parametrize("rows", [1, 40])
def test_row_does_not_depend_on_threads(code: str, rows: int):
    results, x = [], torch.randn(rows, 576)
    (layer,) = layers_of(Int4(), (300, 576))
    for count in (1, 2, 3):
        native.set_threads(count)
        results.append(layer(x))
    native.set_threads(None)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("code", ["native", "portable"], indirect=True)
def test_every_output_is_written_and_nothing_else(code: str, monkeypatch: pytest.MonkeyPatch):
    poison = 12345.0
    for name, shape in (("int4", (51, 37)), ("nf4", (64, 64)), ("q8_0", (33, 96)), ("int8", (1, 70))):
        (layer,) = layers_of(FORMATS[name], shape)
        for rows in (1, 17, 70):
            x = torch.randn(rows, shape[1])
            around = torch.full((rows * shape[0] + 128,), poison)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", lambda *size, room=around: room[64:-64].view(size))
                y = layer(x)
            torch.testing.assert_close(y.double(), reference(layer, x), rtol=0.1, atol=0.05)
            assert bool((around[:64] == poison).all() and (around[-64:] == poison).all())


@every_code
def test_poison_stays_in_its_row(code: str):
    (layer,) = layers_of(FORMATS["q4_1"], (51, 64))
    x = torch.randn(40, 64)
    clean = layer(x)
    x[3] = torch.nan
    dirty, keep = layer(x), torch.arange(40) != 3
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[keep], clean[keep])


def test_any_leading_shape_stride_and_dtype(device: str):
    layer = layers_of(FORMATS["int4"], (51, 37))[0].to(device)
    x = torch.randn(4, 3, 37, device=device)
    y = layer(x)
    assert y.shape == (4, 3, 51)
    assert layer(x[:0]).shape == (0, 3, 51)
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected 37"):
        layer(x[..., 1:])


def test_converting_the_module_leaves_packed_weights_alone():
    (layer,) = layers_of(FORMATS["int4"], (51, 64))
    x = torch.randn(3, 64)
    before = layer(x)
    assert torch.equal(layer.to(torch.bfloat16)(x), before)


def test_an_adapter_adds_its_product():
    (layer,) = layers_of(FORMATS["int4"], (40, 64))
    x, down, up = torch.randn(5, 64), torch.randn(3, 64) / 8, torch.randn(40, 3)
    plain = layer(x)
    layer.adapter = LowRank(down, up)
    assert error(layer(x) - plain, x.double() @ down.double().T @ up.double().T) < 1e-2
    assert torch.equal(torch.cat([layer(row) for row in x.split(1)]), layer(x))
    with pytest.raises(ValueError, match="low-rank"):
        LowRank(down, up.T)


def test_a_device_without_kernels_says_so_once(caplog: pytest.LogCaptureFixture):
    device_of.cache_clear()
    for _ in range(3):
        assert device_of("meta") == Device("meta")
    assert len(caplog.records) == 1
    assert "no kernels" in caplog.text
    device_of.cache_clear()


@every_format
def test_the_table_ends_with_what_can_do_everything(name: str):
    assert KERNELS[-1].name == "dequantize"
    for device in (Device("cpu"), Device("cuda"), Device("meta")):
        assert select(VARIANTS[name], device, 1) is KERNELS[-1]
    assert select(Nf4(), Device("cpu", native=True), 512).name == "native"
