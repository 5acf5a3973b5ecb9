"""Attention over pages, in Triton: several sessions, each with a tree of rows, in one launch.

A row's bits depend on the ordered list of keys that it sees, on nothing else: keys are cut by position into tiles of
64, chunks of 128 and supers of 1,024; tiles of a chunk follow each other in one running softmax, chunks are folded into
their super and supers into the row in order. Two kernels share the work: `shared_tiles` does whole tiles that a
group of rows has in common, `own_tiles` what is left of each row (the rest of the committed rows, then its ancestors,
gathered by position), and folds. Which of the two does a tile makes no difference to its bits.

m, z, a: of a running softmax the largest score, the sum and the weighted values.
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
def step(q, k, v, m, z, acc, scale, softcap, seen, CAPPED: tl.constexpr):
    """One tile of keys [64, width] joins the running softmax of q [rows, width]; seen [rows, 64]."""
    s = tl.dot(q, tl.trans(k)) * scale
    if CAPPED:
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
        s = s * 1.4426950408889634
    s = tl.where(seen, s, LOWEST)
    most = tl.maximum(m, tl.max(s, 1))
    base = tl.where(most == LOWEST, 0.0, most)
    p = tl.exp2(s - base[:, None])
    decay = tl.exp2(m - base)
    z = z * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return most, z, acc


@triton.jit
def shared_tiles(
    q, k_pages, v_pages, table, segment_of, position_of, full_of, first, members, po, pm, pz,
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
    count = tl.load(members + g)
    if count == 0:
        return
    row0 = tl.load(first + g)
    full = tl.load(full_of + row0)
    SIZE: tl.constexpr = SUPER if SUPERS else CHUNK
    low = c * SIZE
    high = tl.minimum(low + SIZE, full)
    if low >= high:
        return
    pages = table + tl.load(segment_of + row0) * table_width
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
    z = tl.zeros((ROWS * GROUPED,), tl.float32)
    acc = tl.zeros((ROWS * GROUPED, VP), tl.float32)
    if SUPERS:
        SM = tl.full((ROWS * GROUPED,), LOWEST, tl.float32)
        SZ = tl.zeros((ROWS * GROUPED,), tl.float32)
        SA = tl.zeros((ROWS * GROUPED, VP), tl.float32)
    for t0 in range(start, high, TILE):
        if SUPERS:
            if (t0 % CHUNK == 0) & (t0 > start):
                SM, SZ, SA = fold(SM, SZ, SA, m, z, acc)
                m = tl.full((ROWS * GROUPED,), LOWEST, tl.float32)
                z = tl.zeros((ROWS * GROUPED,), tl.float32)
                acc = tl.zeros((ROWS * GROUPED, VP), tl.float32)
        position = t0 + t
        page = tl.load(pages + position // PAGE)
        there = page >= 0
        place = (page.to(tl.int64) * PAGE + position % PAGE) * KV + head_kv
        k = tl.load(k_pages + place[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
        v = tl.load(v_pages + place[:, None] * V + e[None, :], mask=there[:, None] & (e[None, :] < V), other=0.0)
        seen = there[None, :] & (position[None, :] >= lowest[:, None])
        m, z, acc = step(q_tile, k, v, m, z, acc, scale, softcap, seen, CAPPED)
    if SUPERS:
        if high % CHUNK == 0:
            SM, SZ, SA = fold(SM, SZ, SA, m, z, acc)
        o = (2 * c * queries + row) * HEADS + head
        tl.store(po + o[:, None] * V + e[None, :], SA, mask=ok[:, None] & (e[None, :] < V))
        tl.store(pm + o, SM, mask=ok)
        tl.store(pz + o, SZ, mask=ok)
        if high % CHUNK != 0:
            o = ((2 * c + 1) * queries + row) * HEADS + head
            tl.store(po + o[:, None] * V + e[None, :], acc, mask=ok[:, None] & (e[None, :] < V))
            tl.store(pm + o, m, mask=ok)
            tl.store(pz + o, z, mask=ok)
    else:
        o = (c * queries + row) * HEADS + head
        tl.store(po + o[:, None] * V + e[None, :], acc, mask=ok[:, None] & (e[None, :] < V))
        tl.store(pm + o, m, mask=ok)
        tl.store(pz + o, z, mask=ok)


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
        for c in range(lowest // SUPER, supers):
            o = (2 * c * queries + u) * HEADS + head
            M, Z, A = fold(
                M, Z, A,
                tl.load(pm + o, mask=ok, other=LOWEST),
                tl.load(pz + o, mask=ok, other=0.0),
                tl.load(po + o[:, None] * V + e[None, :], mask=kept, other=0.0),
            )  # fmt: skip
        if (chunks % (SUPER // CHUNK) > 0) & (chunks > first_chunk):
            o = (2 * supers * queries + u) * HEADS + head
            SM = tl.load(pm + o, mask=ok, other=LOWEST)
            SZ = tl.load(pz + o, mask=ok, other=0.0)
            SA = tl.load(po + o[:, None] * V + e[None, :], mask=kept, other=0.0)
        slot = 2 * supers + 1
    else:
        for c in range(first_chunk, chunks):
            o = (c * queries + u) * HEADS + head
            SM, SZ, SA = fold(
                SM, SZ, SA,
                tl.load(pm + o, mask=ok, other=LOWEST),
                tl.load(pz + o, mask=ok, other=0.0),
                tl.load(po + o[:, None] * V + e[None, :], mask=kept, other=0.0),
            )  # fmt: skip
            if c % (SUPER // CHUNK) == SUPER // CHUNK - 1:
                M, Z, A = fold(M, Z, A, SM, SZ, SA)
                SM = tl.full((GROUPED,), LOWEST, tl.float32)
                SZ = tl.zeros((GROUPED,), tl.float32)
                SA = tl.zeros((GROUPED, VP), tl.float32)
        slot = chunks
    begun = (full % CHUNK > 0) & (full > lowest)
    o = (slot * queries + u) * HEADS + head
    m = tl.load(pm + o, mask=ok & begun, other=LOWEST)
    z = tl.load(pz + o, mask=ok & begun, other=0.0)
    acc = tl.load(po + o[:, None] * V + e[None, :], mask=kept & begun, other=0.0)
    start = tl.maximum(full, lowest // TILE * TILE)
    for t0 in range(start, position_u + 1, TILE):
        if (t0 % CHUNK == 0) & (t0 > full):
            SM, SZ, SA = fold(SM, SZ, SA, m, z, acc)
            m = tl.full((GROUPED,), LOWEST, tl.float32)
            z = tl.zeros((GROUPED,), tl.float32)
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
        k = tl.load(k_pages + place[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
        v = tl.load(v_pages + place[:, None] * V + e[None, :], mask=there[:, None] & (e[None, :] < V), other=0.0)
        m, z, acc = step(q_tile, k, v, m, z, acc, scale, softcap, there[None, :] & ok[:, None], CAPPED)
    SM, SZ, SA = fold(SM, SZ, SA, m, z, acc)
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
