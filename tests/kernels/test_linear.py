import pytest
import torch
import torch.nn.functional as F
from petal.kernels import reference
from petal.kernels.backend import Linear
from petal.kernels.registry import backend_for
from torch import Tensor

SHAPES = [(64, 64), (1, 1), (37, 51), (576, 100), (2100, 33)]
ROWS = [1, 2, 7, 16, 17, 64, 255]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}

every_code = pytest.mark.parametrize("code", ["native", "other", "torch"], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_shape = pytest.mark.parametrize("shape", SHAPES)


def linear(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Linear:
    return backend_for().linear(weight, bias, dtype)


def _layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(shape[1], shape[0]) / shape[0] ** 0.5).to(dtype), torch.randn(shape[1])


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With bfloat16 weights both factors are rounded, nothing else."""
    return reference.linear(x.to(weight.dtype), weight, bias)


@every_code
@every_dtype
@every_shape
def test_close_to_float64(code: str, shape: tuple[int, int], dtype: torch.dtype):
    weight, bias = _layer(shape, dtype)
    layer, plain = linear(weight, bias), linear(weight)
    assert torch.equal(layer.dense(dtype), weight)
    for rows in ROWS:
        x = torch.randn(rows, shape[0])
        torch.testing.assert_close(layer(x).double(), _reference(x, weight, bias), **TOLERANCE)
        torch.testing.assert_close(plain(x).double(), _reference(x, weight), **TOLERANCE)


@every_code
def test_both_factors_are_rounded_to_nearest_even(code: str):
    """Negative control of the tolerance above: without the rounding the same comparison fails."""
    weight, x = torch.randn(40, 64), torch.randn(9, 64)
    x.view(torch.int32)[0] |= 0x8000  # some are halfway between two bfloat16
    x.view(torch.int32)[0] &= ~0x7FFF
    layer = linear(weight, dtype=torch.bfloat16)
    assert torch.equal(layer.dense(), weight.bfloat16().float())
    assert torch.equal(layer(x), layer(x.bfloat16().float()))
    torch.testing.assert_close(layer(x).double(), _reference(x, weight.bfloat16()), **TOLERANCE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(x).double(), reference.linear(x, weight.bfloat16()), **TOLERANCE)


@every_code
@every_dtype
@every_shape
def test_row_does_not_depend_on_the_others(code: str, shape: tuple[int, int], dtype: torch.dtype):
    layer = linear(*_layer(shape, dtype))
    x = torch.randn(100, shape[0])
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in (3, 7, 12, 13, 16, 64, 100):
        assert torch.equal(torch.cat([layer(part) for part in x.split(rows)]), alone)
    assert torch.equal(layer(x.flip(0)).flip(0), alone)


@every_code
@every_dtype
def test_any_number_of_rows_gives_a_row_the_same_bits(code: str, dtype: torch.dtype):
    layer = linear(*_layer((576, 100), dtype))
    x = torch.randn(70, 576)
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in range(1, 71):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@every_code
@every_dtype
def test_more_rows_than_a_cache_holds(code: str, dtype: torch.dtype):
    weight, bias = _layer((4128, 70), dtype)
    layer, x = linear(weight, bias), torch.randn(600, 4128)
    y = layer(x)
    assert torch.equal(torch.cat([layer(part) for part in x.split(100)]), y)
    torch.testing.assert_close(y.double(), _reference(x, weight, bias), **TOLERANCE)


def test_torch_alone_depends_on_the_number_of_rows():
    """The reason for this module. Should this fail, torch has become batch-invariant here."""
    weight, _ = _layer((576, 576))
    x = torch.randn(255, 576)
    alone = torch.cat([F.linear(row, weight) for row in x.split(1)])
    assert any(not torch.equal(torch.cat([F.linear(p, weight) for p in x.split(n)]), alone) for n in (7, 16, 64, 255))


@every_dtype
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("code", ["native", "other"], indirect=True)
def test_row_does_not_depend_on_threads(code: str, rows: int, dtype: torch.dtype):
    backend, threads = backend_for(), torch.get_num_threads()
    layer = backend.linear(*_layer((576, 100), dtype))
    x = torch.randn(rows, 576)
    results = []
    for count in (1, 2, 3):
        backend.threads = count
        results.append(layer(x))
    assert torch.get_num_threads() == threads
    assert all(torch.equal(result, results[0]) for result in results)


@every_dtype
@pytest.mark.parametrize("code", ["native", "other"], indirect=True)
def test_every_output_is_written_and_nothing_else(code: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    poison = 12345.0
    # The last is written past the cache.
    for (width, out), rows in [((37, 51), 1), ((37, 51), 20), ((64, 32), 33), ((70, 1), 70), ((32, 4112), 70)]:
        weight, bias = _layer((width, out), dtype)
        layer, x = linear(weight, bias), torch.randn(rows, width)
        around = torch.full((rows * out + 128,), poison)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *shape, room=around: room[64:-64].view(shape))
            y = layer(x)
        torch.testing.assert_close(y.double(), _reference(x, weight, bias), **TOLERANCE)
        assert bool((around[:64] == poison).all() and (around[-64:] == poison).all())


@every_code
@every_dtype
def test_any_leading_shape_stride_and_dtype(code: str, dtype: torch.dtype):
    weight, bias = _layer((37, 51), dtype)
    layer = linear(weight, bias)
    x = torch.randn(4, 3, 37)
    y = layer(x)
    assert y.shape == (4, 3, 51)
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(layer(torch.randn(4, 3, 74).copy_(x.repeat(1, 1, 2))[..., :37]), y)
    assert torch.equal(layer(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), y)
    assert layer(x[:0]).shape == (0, 3, 51)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, layer(x.bfloat16().float()).bfloat16())


@every_code
@every_dtype
def test_layers_of_one_shape_keep_apart(code: str, dtype: torch.dtype):
    (a, bias), b = _layer((64, 40), dtype), torch.randn(40, 64).to(dtype)
    first, second, x = linear(a, bias), linear(b, bias), torch.randn(5, 64)
    before = first(x)
    second(x)
    assert torch.equal(first(x), before)
    torch.testing.assert_close(second(x).double(), _reference(x, b, bias), **TOLERANCE)


@every_code
@every_dtype
def test_poison_stays_in_its_row(code: str, dtype: torch.dtype):
    layer = linear(*_layer((37, 51), dtype))
    x = torch.randn(20, 37)
    clean = layer(x)
    x[3] = torch.nan
    dirty = layer(x)
    assert dirty[3].isnan().all()
    keep = torch.arange(20) != 3
    assert torch.equal(dirty[keep], clean[keep])


@every_code
def test_arithmetic_names_what_may_differ_in_bits(code: str):
    names = {dtype: backend_for().arithmetic(dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert all(name.startswith("torch-") == (code == "torch") for name in names.values())
    assert names[torch.float32] != "amx"
    assert code == "native" or names[torch.bfloat16] == names[torch.float32]


@every_code
def test_wrong_arguments_are_named(code: str):
    with pytest.raises(TypeError, match="float16"):
        linear(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(TypeError, match="int8"):
        linear(torch.zeros(2, 2), dtype=torch.int8)
    with pytest.raises(ValueError, match="linear layer"):
        linear(torch.zeros(2))
    with pytest.raises(ValueError, match="does not fit 2 outputs"):
        linear(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="expected 3"):
        linear(torch.zeros(2, 3))(torch.zeros(1, 4))
