/* Products in integers: a few columns of depth, a chunk, share scales on both sides, and sums within it are exact.
 *
 * x[row][k] is near scale * (256 * high + low) with a scale for each row and chunk; a weight is a code of at most 8 bits,
 * less a zero, times a scale of its group. Exact sums have no order, so whoever computes them, a row's bits depend on
 * that row and the weights alone, and are the same on every processor with fused multiply-adds. */
#ifndef PETAL_INTEGER_H
#define PETAL_INTEGER_H

#include "linear.h"

#include <math.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef uint8_t u8x64 __attribute__((vector_size(64), aligned(4), may_alias));

enum {
    LANE = LANES,     /* columns of y side by side; a pair of lanes is a panel */
    CHUNK = 256,      /* most depth of a chunk: 256 * 255 * FINEST still fits 32 bits */
    FINEST = 32639,   /* 127 * 256 + 127 */
    TILE_DEPTH = 64,  /* depth of x that lies together */
    SHARE = 32,       /* depth whose nibbles pair up: (d, d + 16) */
    MIDDLE = 128,     /* zero of codes of a byte */
};

/* weights_t here: codes[lane][depth / 4][16][4], a byte or (nibbles) two depths of a run of 32 each; row_bytes of codes a
 * row, group columns under one scale. By kind, where [lane][group][16] is meant unless said:
 * INT8: scales float [lane][16]; zeros: int32 outlier columns, `count` of them; extra: bfloat16 [lane][count][16].
 * INT4: scales float16, zeros uint8; count: groups of a row.
 * NF4: scales uint8 or, without zeros, float; zeros, extra, more: as in decode.c.
 * Q4_0, Q8_0: scales float16. Q4_1: scales float16 [lane][group][2][16], then minima. */

/* x as integers, in blocks of `height` rows of which the last may be padded with zeros. */
typedef struct {
    long height, blocks, depth; /* depth is a multiple of TILE_DEPTH */
    int8_t *tiles;              /* [depth / 64][blocks][high, low][height][64] */
    float *scales;              /* [chunk][blocks * height] */
    int32_t *sums;              /* of the integers, likewise */
} integers_t;

typedef struct {
    linear_t call;
    integers_t x;
} product_t;

/* Leaves y unfinished nowhere: x must be laid out. */
void amx_run_integer(product_t *p, long threads);

/* Depth of the chunk that begins at k. */
static inline long chunk_depth(const weights_t *w, long depth, long k)
{
    long end = (k / w->group + 1) * w->group;
    end = end < depth ? end : depth;
    return end < k + CHUNK ? end - k : CHUNK;
}

static inline bool is_nibbles(kind_t kind) { return kind != INT8 && kind != Q8_0; }

#define INLINE static inline __attribute__((always_inline))

/* What a group says of 16 columns. */
typedef struct {
    f32x16 scale, low; /* low: Q4_1's minimum */
    i32x16 zero;
} group_t;

INLINE f32x16 halves(const uint16_t *from)
{
    f32x16 to;
    for (int i = 0; i < LANE; i++)
        to[i] = fp16_to_float(from[i]);
    return to;
}

/* Scales of 16 rows of NF4, whose blocks are numbered row by row. */
INLINE f32x16 nf4_scales(const weights_t *w, long lane, long group)
{
    long groups = w->in / w->group, at = (lane * groups + group) * LANE;
    const float *nested = w->zeros, *map = w->extra, *offset = w->more;
    if (!nested)
        return *(const f32x16 *)((const float *)w->scales + at);
    const uint8_t *shares = (const uint8_t *)w->scales + at;
    f32x16 to;
    for (long i = 0; i < LANE; i++) {
        long row = lane * LANE + i < w->out ? lane * LANE + i : w->out - 1;
        to[i] = map[shares[i]] * nested[(row * groups + group) / 256] + *offset;
    }
    return to;
}

INLINE group_t group_of(const kind_t kind, const weights_t *w, long lane, long group)
{
    const uint16_t *scales = w->scales;
    long at = lane * (w->in / w->group) + group;
    group_t g = {.zero = {0} };
    switch (kind) {
    case INT8:
        g.scale = *(const f32x16 *)((const float *)w->scales + lane * LANE);
        g.zero += MIDDLE;
        break;
    case INT4:
        at = lane * w->count + group;
        g.scale = halves(scales + at * LANE);
        for (int i = 0; i < LANE; i++)
            g.zero[i] = ((const uint8_t *)w->zeros)[at * LANE + i];
        break;
    case NF4:
        g.scale = nf4_scales(w, lane, group) * (1.0f / FINEST);
        g.zero += MIDDLE;
        break;
    case Q4_1:
        g.scale = halves(scales + at * 2 * LANE);
        g.low = halves(scales + at * 2 * LANE + LANE);
        break;
    default:
        g.scale = halves(scales + at * LANE);
        g.zero += kind == Q8_0 ? MIDDLE : 8;
    }
    return g;
}

INLINE i32x16 whole(i32x16 high, i32x16 low) { return (i32x16)(((u32x16)high << 8) + (u32x16)low); }

INLINE f32x16 real(i32x16 sums) { return __builtin_convertvector(sums, f32x16); }

/* Adds a chunk to the sums of one row: first is of the codes, or of the high bytes of levels, second of the low ones. */
INLINE f32x16 combine(const kind_t kind, f32x16 y, i32x16 first, i32x16 second, const group_t *g, float scale, int32_t sum)
{
    f32x16 step = g->scale * scale;
    if (kind == Q4_1)
        return y + real(first) * step + g->low * (scale * (float)sum);
    f32x16 value = real((i32x16)((u32x16)first - (u32x16)g->zero * (uint32_t)sum));
    if (kind == NF4)
        value = value * 256 + real(second);
    return y + value * step;
}

/* NF4's levels as integers of 16 bits, 256 * (high - MIDDLE) + low: [0] the high bytes, [1] the low ones. */
INLINE void level_bytes(const float *levels, uint8_t to[2][16])
{
    for (int i = 0; i < 16; i++) {
        int level = (int)rintf(levels[i] * FINEST) + 256 * MIDDLE;
        to[0][i] = (uint8_t)(level >> 8);
        to[1][i] = (uint8_t)(level & 255);
    }
}

INLINE u8x64 look_up(u8x64 codes, const uint8_t table[16])
{
    u8x64 wide;
    for (int i = 0; i < 64; i += 16)
        memcpy((char *)&wide + i, table, 16);
#ifdef __AVX512BW__
    return (u8x64)_mm512_shuffle_epi8((__m512i)wide, (__m512i)codes);
#else
    return __builtin_shuffle(wide, codes);
#endif
}

/* The codes of SHARE depths, four a vector. */
INLINE void read_codes(const bool nibbles, const uint8_t *from, u8x64 to[8])
{
    for (int i = 0; i < 8; i++)
        if (nibbles)
            to[i] = *(const u8x64 *)(from + i % 4 * 64) >> i / 4 * 4 & 15;
        else
            to[i] = *(const u8x64 *)(from + i * 64);
}

/* Writes one row of 16 columns, after INT8's outlier columns, whose codes are MIDDLE. */
INLINE void finish_row(const linear_t *c, f32x16 y, long row, long lane)
{
    const weights_t *w = c->packed;
    if (w->kind == INT8)
        for (long i = 0; i < w->count; i++)
            y += load_half((const uint16_t *)w->extra + (lane * w->count + i) * LANE) *
                 c->x[row * c->in + ((const int32_t *)w->zeros)[i]];
    long width = c->out - lane * LANE;
    memcpy(c->y + row * c->out + lane * LANE, &y, (size_t)(width < LANE ? width : LANE) * sizeof(float));
}

#endif
