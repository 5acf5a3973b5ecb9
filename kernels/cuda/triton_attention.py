"""Attention over pages, in Triton: several sessions, each with a tree of rows, in one launch.

A row's bits depend on the ordered list of keys that it sees, on nothing else: keys are cut by position into tiles of
64, chunks of 128 and supers of 1,024; tiles of a chunk follow each other in one running softmax, chunks are folded into
their super and supers into the row in order. Two kernels share the work: `shared_tiles` does whole tiles that a
group of rows has in common, `own_tiles` what is left of each row (the rest of the committed rows, then its ancestors,
gathered by position), and folds. Which of the two does a tile makes no difference to its bits.

m, z, a: of a running softmax the largest score, the sum and the weighted values. The matrix unit adds the sum up, too:
the order of a reduction over threads would change with the shape of a tile. So z is 16 equal columns until a chunk is
done.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def fold(M, Z, A, m, z, a):
    """Two running softmaxes as one."""
    most = tl.maximum(M, m)
    x = tl.where(M == LOWEST, 0.0, tl.exp2(M - most))
    y = tl.where(m == LOWEST, 0.0, tl.exp2(m - most))
    return most, Z * x + z * y, A * x[:, None] + a * y[:, None]


@triton.jit
def rows_of(pages, place, d, there, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [64, PADDED] at places; MASKED: zeros where there are none."""
    at = pages + place[:, None] * WIDTH + d[None, :]
    if MASKED:
        rows = tl.load(at, mask=there[:, None] & (d[None, :] < WIDTH), other=0.0)
    elif WIDTH != PADDED:
        rows = tl.load(at, mask=d[None, :] < WIDTH, other=0.0)
    else:
        rows = tl.load(at)
    return rows


@triton.jit
def step(q, k, v, m, z, acc, scale, softcap, seen, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys [64, width] joins the running softmax of q [rows, width]; MASKED: where seen [rows, 64]."""
    s = tl.dot(q, tl.trans(k))
    if CAPPED:
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * scale * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
        scale = 1.4426950408889634
    if MASKED:
        s = tl.where(seen, s, LOWEST)
    most = tl.maximum(m, tl.max(s, 1) * scale)
    base = most
    if MASKED:
        base = tl.where(most == LOWEST, 0.0, most)
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, tl.zeros_like(s) - base[:, None])).to(v.dtype)
    decay = tl.exp2(m - base)
    z = tl.dot(p, tl.full((p.shape[1], 16), 1.0, v.dtype), z * decay[:, None])
    acc = tl.dot(p, v, acc * decay[:, None])
    return most, z, acc


@triton.jit
def shared_tiles(
    q, k_pages, v_pages, table, position_of, groups, po, pm, pz,
    queries, table_width, scale, softcap, window,
    TILE: tl.constexpr, CHUNK: tl.constexpr, SUPER: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    SUPERS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """A group of rows, one kv head, one chunk (SUPERS: one super) of whole tiles.

    Partial results go to slots [slot, query, head]: of chunk c slot c; SUPERS: of super c, its whole chunks folded in
    slot 2 c, a last chunk that is not whole in slot 2 c + 1.
    """
    g = tl.program_id(0)
    head_kv = tl.program_id(1)
    c = tl.program_id(2)
    count = tl.load(groups + 4 * g)
    row0 = tl.load(groups + 4 * g + 1)
    full = tl.load(groups + 4 * g + 2)
    segment = tl.load(groups + 4 * g + 3)
    if count == 0:
        return
    SIZE: tl.constexpr = SUPER if SUPERS else CHUNK
    low = c * SIZE
    high = tl.minimum(low + SIZE, full)
    if low >= high:
        return
    pages = table + segment * table_width
    i = tl.arange(0, ROWS * GROUPED)
    row = row0 + i // GROUPED
    head = head_kv * GROUP + i % GROUPED
    ok = (i // GROUPED < count) & (i % GROUPED < GROUP)
    d = tl.arange(0, DP)
    e = tl.arange(0, VP)
    t = tl.arange(0, TILE)
    q_tile = tl.load(q + (row * HEADS + head)[:, None] * D + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
    start = low
    lowest = tl.zeros((ROWS * GROUPED,), tl.int32)
    if WINDOWED:
        lowest = tl.load(position_of + row, mask=ok, other=1 << 30) - window + 1
        nearest = tl.min(lowest, 0)
        start = tl.maximum(low, tl.maximum(nearest, 0) // TILE * TILE)
        if start >= high:
            return
    m = tl.full((ROWS * GROUPED,), LOWEST, tl.float32)
    z = tl.zeros((ROWS * GROUPED, 16), tl.float32)
    acc = tl.zeros((ROWS * GROUPED, VP), tl.float32)
    if SUPERS:
        SM = tl.full((ROWS * GROUPED,), LOWEST, tl.float32)
        SZ = tl.zeros((ROWS * GROUPED,), tl.float32)
        SA = tl.zeros((ROWS * GROUPED, VP), tl.float32)
    for t0 in range(start, high, TILE):
        if SUPERS:  # noqa: SIM102 (known when it is compiled)
            if (t0 % CHUNK == 0) & (t0 > start):
                SM, SZ, SA = fold(SM, SZ, SA, m, tl.max(z, 1), acc)
                m = tl.full((ROWS * GROUPED,), LOWEST, tl.float32)
                z = tl.zeros((ROWS * GROUPED, 16), tl.float32)
                acc = tl.zeros((ROWS * GROUPED, VP), tl.float32)
        position = t0 + t
        page = tl.load(pages + position // PAGE)
        there = page >= 0  # pages that a window left behind are given back
        place = (page.to(tl.int64) * PAGE + position % PAGE) * KV + head_kv
        k = rows_of(k_pages, place, d, there, D, DP, WINDOWED)
        v = rows_of(v_pages, place, e, there, V, VP, WINDOWED)
        seen = there[None, :] & (position[None, :] >= lowest[:, None])
        m, z, acc = step(q_tile, k, v, m, z, acc, scale, softcap, seen, CAPPED, WINDOWED)
    if SUPERS:
        if high % CHUNK == 0:
            SM, SZ, SA = fold(SM, SZ, SA, m, tl.max(z, 1), acc)
        o = (2 * c * queries + row) * HEADS + head
        tl.store(po + o[:, None] * V + e[None, :], SA, mask=ok[:, None] & (e[None, :] < V))
        tl.store(pm + o, SM, mask=ok)
        tl.store(pz + o, SZ, mask=ok)
        if high % CHUNK != 0:
            o = ((2 * c + 1) * queries + row) * HEADS + head
            tl.store(po + o[:, None] * V + e[None, :], acc, mask=ok[:, None] & (e[None, :] < V))
            tl.store(pm + o, m, mask=ok)
            tl.store(pz + o, tl.max(z, 1), mask=ok)
    else:
        o = (c * queries + row) * HEADS + head
        tl.store(po + o[:, None] * V + e[None, :], acc, mask=ok[:, None] & (e[None, :] < V))
        tl.store(pm + o, m, mask=ok)
        tl.store(pz + o, tl.max(z, 1), mask=ok)


@triton.jit
def own_tiles(
    q, k_pages, v_pages, table, segment_of, position_of, straight_of, full_of, path, po, pm, pz, sinks, out,
    queries, table_width, path_width, scale, softcap, window,
    TILE: tl.constexpr, CHUNK: tl.constexpr, SUPER: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PAGE: tl.constexpr, SUPERS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, TILED: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    """One row and one kv head: partial results of whole tiles, then the row's own tiles, folded in order.

    out: [queries, heads, V], or activations in tiles of TILED rows (`elementwise.cu`) with EIGHTHS groups of 8 depths.
    """
    u = tl.program_id(0)
    head_kv = tl.program_id(1)
    segment = tl.load(segment_of + u)
    if segment < 0:
        return
    full = tl.load(full_of + u)
    position_u = tl.load(position_of + u)
    straight = tl.load(straight_of + u)
    pages = table + segment * table_width
    i = tl.arange(0, GROUPED)
    ok = i < GROUP
    head = head_kv * GROUP + i
    d = tl.arange(0, DP)
    e = tl.arange(0, VP)
    t = tl.arange(0, TILE)
    q_tile = tl.load(q + (u * HEADS + head)[:, None] * D + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(position_u - window + 1, 0)
    chunks = full // CHUNK
    supers = full // SUPER
    first_chunk = lowest // CHUNK
    M = tl.full((GROUPED,), LOWEST, tl.float32)
    Z = tl.zeros((GROUPED,), tl.float32)
    A = tl.zeros((GROUPED, VP), tl.float32)
    SM = M
    SZ = Z
    SA = A
    kept = ok[:, None] & (e[None, :] < V)
    if SUPERS:
        for c0 in range(lowest // SUPER, supers, 4):
            for i4 in tl.static_range(4):  # side by side: what is not there folds into nothing
                there = ok & (c0 + i4 < supers)
                o = (2 * (c0 + i4) * queries + u) * HEADS + head
                M, Z, A = fold(
                    M, Z, A,
                    tl.load(pm + o, mask=there, other=LOWEST),
                    tl.load(pz + o, mask=there, other=0.0),
                    tl.load(po + o[:, None] * V + e[None, :], mask=kept & there[:, None], other=0.0),
                )  # fmt: skip
        if (chunks % (SUPER // CHUNK) > 0) & (chunks > first_chunk):
            o = (2 * supers * queries + u) * HEADS + head
            SM = tl.load(pm + o, mask=ok, other=LOWEST)
            SZ = tl.load(pz + o, mask=ok, other=0.0)
            SA = tl.load(po + o[:, None] * V + e[None, :], mask=kept, other=0.0)
        slot = 2 * supers + 1
    else:
        for c0 in range(lowest // SUPER * (SUPER // CHUNK), chunks, SUPER // CHUNK):
            SM = tl.full((GROUPED,), LOWEST, tl.float32)
            SZ = tl.zeros((GROUPED,), tl.float32)
            SA = tl.zeros((GROUPED, VP), tl.float32)
            for i8 in tl.static_range(SUPER // CHUNK):
                there = ok & (c0 + i8 >= first_chunk) & (c0 + i8 < chunks)
                o = ((c0 + i8) * queries + u) * HEADS + head
                SM, SZ, SA = fold(
                    SM, SZ, SA,
                    tl.load(pm + o, mask=there, other=LOWEST),
                    tl.load(pz + o, mask=there, other=0.0),
                    tl.load(po + o[:, None] * V + e[None, :], mask=kept & there[:, None], other=0.0),
                )  # fmt: skip
            if c0 + SUPER // CHUNK <= chunks:
                M, Z, A = fold(M, Z, A, SM, SZ, SA)
                SM = tl.full((GROUPED,), LOWEST, tl.float32)
                SZ = tl.zeros((GROUPED,), tl.float32)
                SA = tl.zeros((GROUPED, VP), tl.float32)
        slot = chunks
    begun = (full % CHUNK > 0) & (full > lowest)
    o = (slot * queries + u) * HEADS + head
    m = tl.load(pm + o, mask=ok & begun, other=LOWEST)
    z = tl.load(pz + o, mask=ok & begun, other=0.0)[:, None] + tl.zeros((GROUPED, 16), tl.float32)
    acc = tl.load(po + o[:, None] * V + e[None, :], mask=kept & begun, other=0.0)
    start = tl.maximum(full, lowest // TILE * TILE)
    for t0 in range(start, position_u + 1, TILE):
        if (t0 % CHUNK == 0) & (t0 > full):
            SM, SZ, SA = fold(SM, SZ, SA, m, tl.max(z, 1), acc)
            m = tl.full((GROUPED,), LOWEST, tl.float32)
            z = tl.zeros((GROUPED, 16), tl.float32)
            acc = tl.zeros((GROUPED, VP), tl.float32)
            if t0 % SUPER == 0:
                M, Z, A = fold(M, Z, A, SM, SZ, SA)
                SM = tl.full((GROUPED,), LOWEST, tl.float32)
                SZ = tl.zeros((GROUPED,), tl.float32)
                SA = tl.zeros((GROUPED, VP), tl.float32)
        position = t0 + t
        valid = (position <= position_u) & (position >= lowest)
        beside = valid & (position >= straight)
        at = tl.load(path + u * path_width + position - straight, mask=beside, other=0)
        own = tl.where(beside, at, position)
        page = tl.load(pages + own // PAGE, mask=valid, other=-1)
        there = page >= 0
        place = (page.to(tl.int64) * PAGE + own % PAGE) * KV + head_kv
        k = rows_of(k_pages, place, d, there, D, DP, True)
        v = rows_of(v_pages, place, e, there, V, VP, True)
        m, z, acc = step(q_tile, k, v, m, z, acc, scale, softcap, there[None, :] & ok[:, None], CAPPED, True)
    SM, SZ, SA = fold(SM, SZ, SA, m, tl.max(z, 1), acc)
    M, Z, A = fold(M, Z, A, SM, SZ, SA)
    if SINKS:
        sink = tl.load(sinks + head, mask=ok, other=0.0) * 1.4426950408889634
        M, Z, A = fold(M, Z, A, sink, tl.full((GROUPED,), 1.0, tl.float32), tl.zeros((GROUPED, VP), tl.float32))
    result = (A / Z[:, None]).to(out.dtype.element_ty)
    column = head[:, None] * V + e[None, :]
    if TILED == 0:
        tl.store(out + u * (HEADS * V) + column, result, mask=kept)
    else:
        place = ((u // TILED) * EIGHTHS + column // 8) * TILED + u % TILED
        tl.store(out + place * 8 + column % 8, result, mask=kept)
