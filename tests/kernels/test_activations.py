"""Activations as a device encodes them are those of the wire, to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from petal.kernels.activations import GROUP, ActivationError, HostRows, decode, encode
from petal.protocol.wire import codec
from torch import Tensor

every_codec = pytest.mark.parametrize("name", codec.CODECS)


def rows(width: int, n: int = 9) -> Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(width))
    x[1] *= 1e-30
    x[2] = 0
    x[3, ::7] *= 1e20
    x.view(torch.int32)[4] |= 0x8000  # halfway between two bfloat16
    x.view(torch.int32)[4] &= ~0x7FFF
    return x


@every_codec
@pytest.mark.parametrize("width", [1, 64, 100, 576])
def test_bytes_are_the_same(name: str, width: int) -> None:
    x, number = rows(width), codec.CODECS[name]
    ours, wire = bytes(encode(name, x)), codec.encode(number, x.numpy())
    assert ours == wire
    assert len(ours) == 9 * codec.row_bytes(number, width)
    back = decode(name, bytearray(wire), width)
    np.testing.assert_array_equal(back.numpy(), codec.decode(number, wire, width))
    assert bytes(encode(name, x.T.contiguous().T)) == wire  # however the rows lie
    assert bytes(encode(name, torch.cat((x, x))[:9])) == wire


def test_groups_are_the_wires() -> None:
    assert GROUP == codec.GROUP


def test_float32_rows_are_not_copied() -> None:
    x = rows(8)
    view = encode("float32", x)
    x[0, 0] = 5
    assert bytes(view) == x.numpy().tobytes()
    data = bytearray(bytes(view))
    back = decode("float32", data, 8)
    data[:4] = np.float32(7).tobytes()
    assert back[0, 0] == 7


@every_codec
def test_what_is_no_activation_is_named(name: str) -> None:
    wire = bytearray(codec.encode(codec.CODECS[name], rows(64).numpy()))
    for wrong in (bytearray(), wire[:-1]):
        with pytest.raises(ActivationError, match="are no rows of"):
            decode(name, wrong, 64)
    for value in (np.nan, np.inf):
        spoilt = rows(64)
        spoilt[5, 3] = value
        encoded = bytearray(bytes(encode(name, spoilt)))
        if name == "int8":  # its scale tells
            encoded[5 * 68 : 5 * 68 + 4] = np.float32(value).tobytes()
        with pytest.raises(ActivationError, match="not finite"):
            decode(name, encoded, 64)


def test_rows_of_a_device_come_over_one_by_one() -> None:
    asked: list[int] = []

    class Row(Tensor):
        def cpu(self, *_: object) -> Tensor:  # type: ignore[override]
            asked.append(int(self[0]))
            return self.as_subclass(Tensor)

    found = HostRows([torch.tensor([float(i), 1.0]).as_subclass(Row) for i in range(5)])
    assert found[3].tolist() == [3.0, 1.0]
    assert [len(found), len(found[1:3]), found[1:3][0].tolist()] == [5, 2, [1.0, 1.0]]
    assert asked == [3, 1]
