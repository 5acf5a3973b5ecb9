"""The twin of `src/linear.cu` in Triton: the same blobs, the same order of sums, the same bits, more time.

It multiplies while the CUDA source is compiled, and where that fails. int4 by groups of 64, and NF4.
"""

import triton
import triton.language as tl


@triton.jit
def number(bits):
    """float32 of the bits of a bfloat16 in the upper half of a word."""
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(words, scale, levels, AT: tl.constexpr, NF4: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [32, 16] whose codes lie at bit AT of words [32, 16], with the numbers [32] of their outputs."""
    code = (words >> AT) & 15
    if NF4:
        rounded = scale.to(tl.float32, bitcast=True).to(tl.bfloat16).to(tl.float32)
        value = tl.load(levels + code).to(tl.float32) * rounded[:, None]
    else:
        value = (code.to(tl.float32) + 128.0 + number(scale)[:, None]) * number(scale << 16)[:, None]
    return value.to(tl.bfloat16).to(DTYPE)


@triton.jit
def outputs_of(words, scale, levels, H: tl.constexpr, NF4: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [pair 32, 4 t + j 16, e 2, c 2] of the first (H = 0) or second outputs of each pair."""
    P: tl.constexpr = 8 if NF4 else 4  # bits from one pair of codes to the next, and from the first of a pair
    E: tl.constexpr = 4 if NF4 else 16  # to the second
    return tl.join(
        tl.join(
            weights_of(words, scale, levels, P * H, NF4, DTYPE),
            weights_of(words, scale, levels, P * H + E, NF4, DTYPE),
        ),
        tl.join(
            weights_of(words, scale, levels, P * (2 + H), NF4, DTYPE),
            weights_of(words, scale, levels, P * (2 + H) + E, NF4, DTYPE),
        ),
    )


@triton.jit
def linear(
    blobs, x, bias, levels, y, rows, outputs, depth_blobs,
    TILE: tl.constexpr, LINES: tl.constexpr, NF4: tl.constexpr, BIASED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """64 outputs of a tile of rows. x: activations (`src/elementwise.cu`) in tiles of TILE rows; y [rows, outputs].

    LINES: rows that are multiplied, at least 16: products of 8 rows have an order of sums of their own.
    """
    n = tl.program_id(0)
    tile = tl.program_id(1)
    pair = tl.arange(0, 32)
    place = tl.arange(0, 16)
    depth = tl.arange(0, 64)
    row = tl.arange(0, LINES)
    quarter = depth_blobs // 4
    total = tl.zeros((64, LINES), tl.float32)
    for q in tl.static_range(4):
        sums = tl.zeros((64, LINES), tl.float32)
        for kb in range(q * quarter, (q + 1) * quarter):
            blob = blobs + (n.to(tl.int64) * depth_blobs + kb) * 576
            words = tl.load(blob + pair[:, None] * 16 + place[None, :])
            s0 = tl.load(blob + 512 + pair * 2)
            s1 = tl.load(blob + 513 + pair * 2)
            if NF4:  # turned back: a pair of codes is a byte
                words = (words >> 7) & 0x1FFFFFF | (words << 25)
            first = outputs_of(words, s0, levels, 0, NF4, DTYPE)
            v = tl.join(first, outputs_of(words, s1, levels, 1, NF4, DTYPE))
            v = tl.reshape(v, (4, 8, 4, 4, 2, 2, 2))  # warp, g, t, j, e, c, h
            v = tl.permute(v, (0, 6, 1, 3, 5, 2, 4))  # outputs: warp, h, g; depths: j, c, t, e
            weights = tl.reshape(v, (64, 64))
            eighth = (tile * depth_blobs + kb) * 8 + depth // 8
            at = eighth[:, None] * (TILE * 8) + row[None, :] * 8 + (depth % 8)[:, None]
            sums = tl.dot(weights, tl.load(x + at, mask=(row < TILE)[None, :], other=0.0), sums)
        total += sums
    output = n * 64 + tl.arange(0, 64)
    if BIASED:
        total += tl.load(bias + output, mask=output < outputs, other=0.0)[:, None]
    line = tile * TILE + row
    there = (output < outputs)[:, None] & ((row < TILE) & (line < rows))[None, :]
    tl.store(y + line[None, :] * outputs + output[:, None], total.to(y.dtype.element_ty), mask=there)
