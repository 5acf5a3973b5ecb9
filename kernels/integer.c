#include "integer.h"

#include "crew.h"

enum {
    FEW = 4,               /* rows that share a visit to codes */
    TALL = 8,              /* rows of a block for the matrix unit: high and low parts fill its registers */
    TOO_SMALL = 32 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
    AHEAD = 2048,          /* bytes; hides memory latency */
};

static long least(long a, long b) { return a < b ? a : b; }

/* Adds the products of four depths of 16 columns with four of x. */
INLINE i32x16 dot(i32x16 sums, u8x64 codes, const int8_t *x)
{
#ifdef __AVX512VNNI__
    int32_t four;
    memcpy(&four, x, sizeof four);
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#else
    u32x16 fours = (u32x16)codes;
    for (int i = 0; i < 4; i++)
        sums += (i32x16)(fours >> 8 * i & 255) * x[i];
    return sums;
#endif
}

/* A chunk of one row; returns its scale. A row with an infinity or no number gets a scale that is none. */
static float round_chunk(const float *x, long count, long stride, int8_t *high, int8_t *low, int32_t *sum)
{
    const uint32_t infinite = 0x7f800000;
    const float tiny = 0x1p-100f;
    uint32_t top = 0;
    for (long i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float most;
    memcpy(&most, &top, sizeof most);
    float inverse = top < infinite && most > tiny ? FINEST / most : 0;
    int32_t total = 0;
    for (long i = 0; i < count; i += TILE_DEPTH, high += stride, low += stride)
        for (long j = 0; j < least(TILE_DEPTH, count - i); j++) {
            int32_t value = inverse ? (int32_t)rintf(x[i + j] * inverse) : 0, upper = (value + 128) >> 8;
            high[j] = (int8_t)upper;
            low[j] = (int8_t)(value - 256 * upper);
            total += value;
        }
    *sum = total;
    return top < infinite ? most / FINEST : NAN;
}

static void round_block(void *job, long block)
{
    product_t *p = job;
    integers_t *x = &p->x;
    const linear_t *c = &p->call;
    long block_bytes = 2 * x->height * TILE_DEPTH, stride = x->blocks * block_bytes;
    for (long k = 0; k < x->depth; k += TILE_DEPTH)
        memset(x->tiles + k / TILE_DEPTH * stride + block * block_bytes, 0, (size_t)block_bytes);
    for (long m = 0; m < least(x->height, c->rows - block * x->height); m++) {
        long row = block * x->height + m, chunk = row;
        for (long k = 0, deep; k < c->in; k += deep, chunk += x->blocks * x->height) {
            deep = chunk_depth(c->packed, x->depth, k);
            int8_t *high = x->tiles + k / TILE_DEPTH * stride + block * block_bytes + m * TILE_DEPTH + k % TILE_DEPTH;
            x->scales[chunk] = round_chunk(c->x + row * c->in + k, least(deep, c->in - k), stride, high,
                                           high + x->height * TILE_DEPTH, x->sums + chunk);
        }
    }
}

/* `rows` rows from a block's first on, 16 columns. */
INLINE void run_rows(const kind_t kind, const int rows, const product_t *p, long block, long lane)
{
    const linear_t *c = &p->call;
    const integers_t *x = &p->x;
    const weights_t w = *c->packed;
    const bool nibbles = is_nibbles(kind);
    const long block_bytes = 2 * x->height * TILE_DEPTH, stride = x->blocks * block_bytes;
    const uint8_t *codes = w.codes + lane * w.row_bytes * LANE;
    uint8_t levels[2][16];
    if (kind == NF4)
        level_bytes((const float *)w.more + 1, levels);
    f32x16 y[FEW];
    for (int m = 0; m < rows; m++)
        y[m] = *(const f32x16 *)(c->bias + lane * LANE);
    long chunk = block * x->height;
    for (long k = 0, deep; k < c->in; k += deep, chunk += x->blocks * x->height) {
        deep = chunk_depth(&w, x->depth, k);
        i32x16 high[FEW][2] = {0}, low[FEW][2] = {0};
        for (long j = k; j < k + deep; j += SHARE, codes += nibbles ? SHARE * LANE / 2 : SHARE * LANE) {
            const int8_t *from = x->tiles + j / TILE_DEPTH * stride + block * block_bytes + j % TILE_DEPTH;
            u8x64 u[8];
            for (int line = 0; line < (nibbles ? 4 : 8); line++)
                __builtin_prefetch(codes + AHEAD + line * 64, 0, 3);
            read_codes(nibbles, codes, u);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++)
                    for (int plane = 0; plane < (kind == NF4 ? 2 : 1); plane++) {
                        u8x64 v = kind == NF4 ? look_up(u[i], levels[plane]) : u[i];
                        const int8_t *four = from + m * TILE_DEPTH + 4 * i;
                        high[m][plane] = dot(high[m][plane], v, four);
                        low[m][plane] = dot(low[m][plane], v, four + x->height * TILE_DEPTH);
                    }
        }
        group_t g = group_of(kind, &w, lane, k / w.group);
        for (int m = 0; m < rows; m++)
            y[m] = combine(kind, y[m], whole(high[m][0], low[m][0]), whole(high[m][1], low[m][1]), &g,
                           x->scales[chunk + m], x->sums[chunk + m]);
    }
    for (int m = 0; m < rows; m++)
        finish_row(c, y[m], block * x->height + m, lane);
}

INLINE void run_kind(const kind_t kind, const product_t *p, long block, long lane)
{
    switch (least(p->x.height, p->call.rows - block * p->x.height)) {
    case 1:
        return run_rows(kind, 1, p, block, lane);
    case 2:
        return run_rows(kind, 2, p, block, lane);
    case 3:
        return run_rows(kind, 3, p, block, lane);
    default:
        return run_rows(kind, 4, p, block, lane);
    }
}

/* One block of rows, 16 columns. */
static void run_lane(const product_t *p, long block, long lane)
{
    switch ((kind_t)p->call.packed->kind) {
    case INT8:
        return run_kind(INT8, p, block, lane);
    case INT4:
        return run_kind(INT4, p, block, lane);
    case NF4:
        return run_kind(NF4, p, block, lane);
    case Q4_0:
        return run_kind(Q4_0, p, block, lane);
    case Q4_1:
        return run_kind(Q4_1, p, block, lane);
    default:
        return run_kind(Q8_0, p, block, lane);
    }
}

static void run_chunk(void *job, long chunk)
{
    const product_t *p = job;
    part_t part = part_of(&p->call, chunk);
    long lanes = least(part.to * PANEL, (p->call.out + LANE - 1) / LANE * LANE) / LANE;
    for (long lane = part.from * PANEL / LANE; lane < lanes; lane++)
        for (long block = 0; block < p->x.blocks; block++)
            run_lane(p, block, lane);
}

/* Nonzero, with y unfinished, where memory lacks. bias is padded to whole panels. */
int petal_integer(float *y, const float *x, const weights_t *w, const float *bias, long rows, long threads)
{
    product_t p = {.call = {.y = y, .x = x, .packed = w, .bias = bias, .rows = rows, .in = w->in, .out = w->out}};
    if (!rows)
        return 0;
    bool unit = rows > FEW && amx_ready();
    long tallest = unit ? TALL : FEW;
    p.x.blocks = (rows + tallest - 1) / tallest;
    p.x.height = (rows + p.x.blocks - 1) / p.x.blocks;
    p.x.depth = (w->in + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    long padded = p.x.blocks * p.x.height, numbers = p.x.depth / SHARE * padded;
    p.x.tiles = scratch(ROWS, 2 * padded * p.x.depth + 2 * numbers * (long)sizeof(float));
    if (!p.x.tiles)
        return 1;
    p.x.scales = (float *)(p.x.tiles + 2 * padded * p.x.depth);
    p.x.sums = (int32_t *)(p.x.scales + numbers);
    threads = rows * w->in * w->out < TOO_SMALL ? 1 : threads;
    crew_run(threads, p.x.blocks, round_block, &p);
    p.call.wide = 4;
    p.call.height = rows;
    if (unit)
        amx_run_integer(&p, threads);
    else
        crew_run(threads, count_parts(&p.call), run_chunk, &p);
    return 0;
}
