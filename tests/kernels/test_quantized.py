"""Products with quantized weights beside float64, whoever computes them."""

from __future__ import annotations

import pytest
import torch
from petal.kernels.adapter import LowRank
from petal.kernels.backend import Linear
from petal.kernels.cpu.layout import INTERLEAVED, PIECE
from petal.kernels.cpu.library import kernels
from petal.kernels.formats.aqlm import Aqlm
from petal.kernels.formats.base import Format, QuantizedTensor
from petal.kernels.formats.int4 import Int4
from petal.kernels.formats.registry import FORMATS
from petal.kernels.registry import NoBackend, backend_for
from petal.kernels.torch.backend import TorchBackend
from torch import Tensor

from .quantized_weights import INTEGER, VARIANTS, random_tensors

ROWS = [1, 2, 7, 16, 17, 64, 255, 512]
SHAPES = [(64, 64), (51, 40), (300, 576), (33, 51), (96, 768), (40, 1544)]
TOLERANCE = 3e-3  # relative, Frobenius
OUTLIERS = ("_values", "_outliers", "_col_vals")

DECODED = [name for name in VARIANTS if name.startswith(("aqlm", "spqr", "fp16", "q5", "iq")) or name.endswith("_k")]

every_format = pytest.mark.parametrize("name", VARIANTS)
every_code = pytest.mark.parametrize("code", ["native", "other", "torch"], indirect=True)


def layers_of(format: Format, shape: tuple[int, int], count: int = 1, device: str = "cpu") -> list[Linear]:
    torch.manual_seed(0)
    matrices = [QuantizedTensor(format, random_tensors(format, shape, i), shape) for i in range(count)]
    return [backend_for(device).linear(matrix, torch.randn(shape[0])) for matrix in matrices]


def rounded(layer: Linear) -> Linear:
    """The layer of its weights in bfloat16."""
    return backend_for().linear(layer.dense(), layer.bias, torch.bfloat16)


def shapes_of(format: Format) -> list[tuple[int, int]]:
    unit = getattr(format, "block", 8 if isinstance(format, Aqlm) else 1)
    return [shape for shape in SHAPES if shape[1] % unit == 0]


def reference(layer: Linear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return x.double() @ layer.dense(torch.float64).T + layer.bias.double()


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@every_format
def test_close_to_float64(name: str, device: str):
    """Two layers of a shape in one process: none reads the other's weights."""
    for shape in shapes_of(VARIANTS[name]):
        layers = layers_of(VARIANTS[name], shape, 2, device)
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
        plain = rounded(layer)
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
        assert error(layer(x), expected) < (3e-4 if name in ("int8", "q8_0") else 1.6e-3)
        assert error(rounded(layer)(x), expected) > error(layer(x), expected)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("out", [INTERLEAVED * PIECE, 2 * INTERLEAVED * PIECE + 5])
def test_a_matrix_that_is_laid_out_in_pieces_is_whole(name: str, out: int):
    tensors = random_tensors(FORMATS[name], (out, 64))
    layer = backend_for().linear(QuantizedTensor(FORMATS[name], tensors, (out, 64)))
    assert torch.equal(layer.dense(), FORMATS[name].dequantize(tensors, (out, 64), torch.float32))
    x = torch.randn(3, 64)
    assert error(layer(x), x.double() @ layer.dense(torch.float64).T) <= TOLERANCE


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


@pytest.mark.parametrize("code", ["native", "other"], indirect=True)
@pytest.mark.parametrize("rows", [1, 40])
def test_row_does_not_depend_on_threads(code: str, rows: int):
    results, x = [], torch.randn(rows, 576)
    backend, shape = backend_for(), (300, 576)
    layer = backend.linear(QuantizedTensor(Int4(), random_tensors(Int4(), shape), shape))
    for count in (1, 2, 3):
        backend.threads = count
        results.append(layer(x))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("code", ["native", "other"], indirect=True)
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
    (layer,) = layers_of(FORMATS["int4"], (51, 37), device=device)
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
    layer.adapter = LowRank(backend_for(), down, up)
    assert error(layer(x) - plain, x.double() @ down.double().T @ up.double().T) < 1e-2
    assert torch.equal(torch.cat([layer(row) for row in x.split(1)]), layer(x))
    with pytest.raises(ValueError, match="low-rank"):
        LowRank(backend_for(), down, up.T)


def test_a_device_is_named_or_refused_in_one_sentence(caplog: pytest.LogCaptureFixture):
    assert backend_for("cpu").name == "cpu" or kernels() is None
    for device, said in (
        ("abacus", "choose one of auto, cpu, cuda"),
        ("cpu:1", "one CPU"),
        ("xpu:77", "cannot be used here"),
    ):
        with pytest.raises(NoBackend, match=said) as refused:
            backend_for(device)
        assert str(refused.value).count("\n") == 0
    assert not caplog.records


@every_format
def test_nbytes_is_what_a_handle_takes(name: str):
    format = VARIANTS[name]
    for shape in shapes_of(format):
        for backend in (backend_for(), TorchBackend(torch.device("cpu"))):
            handle = backend.linear(QuantizedTensor(format, random_tensors(format, shape), shape))
            held = handle.nbytes - sum(t.nbytes for n, t in handle.named_buffers() if n.endswith(OUTLIERS))
            assert abs(held - backend.nbytes(format, shape)) <= 4096
