import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from petal.protocol.petal_pb2 import BF16, CODEC_UNSPECIFIED, FLOAT32, INT8
from petal.protocol.wire.codec import CODECS, CodecError, decode, encode, from_bf16, row_bytes, to_bf16

WIDTHS = [1, 2, 63, 64, 65, 128, 130, 576]
FINITE = st.floats(width=32, min_value=-(2.0**120), max_value=2.0**120)


def rows_of(elements: st.SearchStrategy[float] = FINITE) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 140))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codec", CODECS.values())
def test_sizes(codec, width):
    rows = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    data = encode(codec, rows)
    assert len(data) == 5 * row_bytes(codec, width)
    assert decode(codec, data, width).shape == (5, width)
    assert decode(codec, data, width).dtype == np.float32
    # Rows stand alone: a step may be cut anywhere between two of them.
    assert b"".join(encode(codec, row[None]) for row in rows) == data


def test_bytes_of_a_row():
    assert [row_bytes(codec, 576) for codec in (FLOAT32, BF16, INT8)] == [2304, 1152, 576 + 9 * 4]
    assert row_bytes(INT8, 65) == 65 + 2 * 4
    with pytest.raises(CodecError, match="codec 0 is none of float32, bf16, int8"):
        row_bytes(CODEC_UNSPECIFIED, 64)


@given(rows_of())
def test_float32_is_exact(rows):
    assert decode(FLOAT32, encode(FLOAT32, rows), rows.shape[1]).tobytes() == rows.tobytes()


@given(rows_of())
@example(np.array([[1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 1e-45]], np.float32))
def test_bf16_rounds_as_torch(rows):
    expected = torch.from_numpy(rows).bfloat16()
    assert to_bf16(rows).tobytes() == expected.view(torch.int16).numpy().tobytes()
    assert np.array_equal(decode(BF16, encode(BF16, rows), rows.shape[1]), expected.float().numpy())


def test_every_bf16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bf16(bits)
    finite = np.isfinite(values)
    assert np.array_equal(to_bf16(values)[finite], bits[finite])
    assert np.array_equal(np.isnan(from_bf16(to_bf16(values))), np.isnan(values))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000, 0x7F800000, 0xFF800000])
@pytest.mark.parametrize("codec", CODECS.values())
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_never_arrives_as_a_number(codec, bits):
    rows = np.ones((2, 70), np.float32)
    rows.view(np.uint32)[1, 66] = bits
    with pytest.raises(CodecError, match="not finite"):
        decode(codec, encode(codec, rows), 70)


def test_opposite_infinities_do_not_cancel():
    rows = np.array([[np.inf, -np.inf, 1.0]], np.float32)
    for codec in (FLOAT32, BF16):
        with pytest.raises(CodecError, match="not finite"):
            decode(codec, encode(codec, rows), 3)


def test_a_scale_that_is_not_finite():
    data = bytearray(encode(INT8, np.ones((1, 64), np.float32)))
    data[:4] = np.float32(np.inf).tobytes()
    with pytest.raises(CodecError, match="not finite"):
        decode(INT8, bytes(data), 64)


@settings(deadline=None)
@given(rows_of())
def test_int8_errs_by_half_a_step_of_each_group(rows):
    width = rows.shape[1]
    decoded = decode(INT8, encode(INT8, rows), width)
    for start in range(0, width, 64):
        group = slice(start, start + 64)
        step = np.abs(rows[:, group]).max(axis=1, keepdims=True).astype(np.float64) / 127
        # 1e-40: below that float32 itself has too few bits for a scale.
        bound = step * 0.5001 + 1e-40
        assert (np.abs(decoded[:, group].astype(np.float64) - rows[:, group]) <= bound).all()


def test_int8_groups_do_not_disturb_each_other():
    rows = np.ones((1, 192), np.float32)
    rows[0, 0] = 1e6
    decoded = decode(INT8, encode(INT8, rows), 192)
    assert np.allclose(decoded[0, 64:], 1, rtol=1e-6)
    assert (decode(INT8, encode(INT8, np.zeros((3, 65), np.float32)), 65) == 0).all()


@pytest.mark.parametrize("codec", CODECS.values())
def test_a_wrong_length_is_refused(codec):
    data = encode(codec, np.ones((2, 70), np.float32))
    for wrong in (b"", data[:-1], data + b"x", data[:3]):
        with pytest.raises(CodecError, match=f"{len(wrong)} bytes are no rows of {row_bytes(codec, 70)}"):
            decode(codec, wrong, 70)


@given(st.sampled_from(list(CODECS.values())), st.binary(max_size=300), st.integers(1, 80))
def test_any_bytes_give_finite_rows_or_an_error(codec, data, width):
    try:
        rows = decode(codec, data, width)
    except CodecError:
        return
    assert rows.shape == (len(data) // row_bytes(codec, width), width)
    assert np.isfinite(rows).all()


def test_a_view_with_gaps_is_encoded_like_its_copy():
    rows = np.random.default_rng(1).standard_normal((6, 140)).astype(np.float32)[::2, ::2]
    for codec in CODECS.values():
        assert encode(codec, rows) == encode(codec, rows.copy())
