import pytest
import torch
import torch.nn.functional as F
from petal.kernels import native, reference
from petal.kernels.linear import PackedLinear

SHAPES = [(64, 64), (1, 1), (37, 51), (576, 100), (2100, 33)]
ROWS = [1, 2, 7, 16, 17, 64, 255]


def _layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (torch.randn(shape[1], shape[0]) / shape[0] ** 0.5).to(dtype), torch.randn(shape[1])


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_float64(shape: tuple[int, int], dtype: torch.dtype):
    weight, bias = _layer(shape, dtype)
    layer, plain = PackedLinear(weight, bias), PackedLinear(weight)
    assert torch.equal(layer.dense(), weight)
    for rows in ROWS:
        x = torch.randn(rows, shape[0])
        torch.testing.assert_close(layer(x).double(), reference.linear(x, weight, bias), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(plain(x).double(), reference.linear(x, weight), atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_does_not_depend_on_the_others(shape: tuple[int, int], dtype: torch.dtype):
    layer = PackedLinear(*_layer(shape, dtype))
    x = torch.randn(255, shape[0])
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in (2, 3, 7, 12, 13, 16, 64, 255):
        assert torch.equal(torch.cat([layer(part) for part in x.split(rows)]), alone)
    assert torch.equal(layer(x.flip(0)).flip(0), alone)


def test_torch_alone_depends_on_the_number_of_rows():
    """The reason for this module. Should this fail, torch has become batch-invariant here."""
    weight, _ = _layer((576, 576))
    x = torch.randn(255, 576)
    alone = torch.cat([F.linear(row, weight) for row in x.split(1)])
    assert any(not torch.equal(torch.cat([F.linear(p, weight) for p in x.split(n)]), alone) for n in (7, 16, 64, 255))


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_row_does_not_depend_on_threads(rows: int):
    if native.library() is None:
        pytest.skip("no C compiler")
    layer, threads = PackedLinear(*_layer((576, 100))), torch.get_num_threads()
    x = torch.randn(rows, 576)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(layer(x))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("code")
def test_any_leading_shape_stride_and_dtype():
    weight, bias = _layer((37, 51))
    layer = PackedLinear(weight, bias)
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


@pytest.mark.usefixtures("code")
def test_layers_of_one_shape_keep_apart():
    (a, bias), b = _layer((64, 40)), torch.randn(40, 64)
    first, second, x = PackedLinear(a, bias), PackedLinear(b, bias), torch.randn(5, 64)
    before = first(x)
    second(x)
    assert torch.equal(first(x), before)
    torch.testing.assert_close(second(x).double(), reference.linear(x, b, bias), atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("code")
def test_poison_stays_in_its_row():
    layer = PackedLinear(*_layer((37, 51)))
    x = torch.randn(20, 37)
    clean = layer(x)
    x[3] = torch.nan
    dirty = layer(x)
    assert dirty[3].isnan().all()
    keep = torch.arange(20) != 3
    assert torch.equal(dirty[keep], clean[keep])


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="float16"):
        PackedLinear(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="linear layer"):
        PackedLinear(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="expected 3"):
        PackedLinear(torch.zeros(2, 3))(torch.zeros(1, 4))
