/* Products in integers: weights are codes of at most 8 bits under a scale of their group, x is rounded to integers of two
 * parts under a scale for each row and chunk of depth. Sums within a chunk are exact, and exact sums have no order: whoever
 * computes them, a row's bits depend on that row and the weights alone, and are the same on every processor with fused
 * multiply-adds.
 *
 * Codes of 4 bits: x = 16 high + low, and (16 code) high + code low is one sum.
 * Codes of 8 bits: x = 256 high + low, a sum for each.
 * NF4: x = 16 high + low, levels are 16 p + q; all but q low is counted, in a sum for p high and one for the rest. */
#ifndef PETAL_INTEGER_H
#define PETAL_INTEGER_H

#include "linear.h"

#include <math.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum {
    INTERLEAVED = LANES, /* columns of y side by side; two strips are a panel */
    CHUNK = 256,  /* most depth of a chunk of EIGHT_BITS: sums fit 32 bits */
    FINE = 64,    /* and of others, whose integers are smaller: a large value spoils fewer neighbours */
    SHARE = 32,   /* depth whose four-bit codes pair up, (d, d + 16) in a byte */
    MIDDLE = 128, /* zero of codes of a byte and of p */
    SLIGHT = 8,   /* zero of q */
};

/* weights_t here: codes[strip][depth / 4][16][4], bytes or pairs of 4 bits; row_bytes of codes a row; group columns under one
 * scale. By kind, [strip][group][16] unless said otherwise:
 * INT8: scales float [strip][16]; zeros: int32 outlier columns, `count` of them; extra: bfloat16 [strip][count][16].
 * INT4: scales float16, zeros uint8; count: groups of a row.
 * NF4: scales uint8 or, where there are no zeros, float; zeros, extra, more: as in decode.c.
 * Q4_0, Q8_0: scales float16. Q4_1: scales float16 [strip][group][2][16], the second of each pair the minimum. */

typedef enum { FOUR_BITS, EIGHT_BITS, LEVELS } codes_t;

static inline codes_t codes_of(kind_t kind)
{
    return kind == NF4 ? LEVELS : kind == INT8 || kind == Q8_0 ? EIGHT_BITS : FOUR_BITS;
}

/* What a chunk of a row of x says beside its integers. */
typedef struct {
    float scale;
    union {
        float shift; /* FOUR_BITS: the chunk's sum, in units of x */
        int32_t sum; /* else: what zeros of codes add to sums of products */
    };
} number_t;

/* x as integers, in blocks of `height` rows of which the last may be padded with zeros, [depth / unit][blocks]. A block is
 * [high, low][height][64] or, where unit is 32, [height][high, low][32]: rows are 64 bytes apart, parts `apart`. */
typedef struct {
    long height, blocks, depth, unit, apart;
    int8_t *parts;
    number_t *numbers; /* [chunk][blocks * height] */
} integers_t;

typedef struct {
    linear_t call;
    integers_t x;
    uint8_t levels[2][16]; /* NF4's as 16 (p - MIDDLE) + q - SLIGHT: [0] the p, [1] the q */
} product_t;

/* x must be laid out. */
void amx_run_integer(product_t *p, long threads);

/* Depth of the chunk that begins at k. */
static inline long chunk_depth(const weights_t *w, long depth, long k)
{
    long end = (k / w->group + 1) * w->group;
    long most = codes_of((kind_t)w->kind) == EIGHT_BITS ? CHUNK : FINE;
    end = end < depth ? end : depth;
    return end < k + most ? end - k : most;
}

#define INLINE static inline __attribute__((always_inline))

/* The largest integer of x, and of NF4's levels. */
INLINE int finest(const codes_t codes) { return codes == EIGHT_BITS ? 127 * 256 + 127 : 127 * 16 + 7; }

/* The integers of a block at a depth. */
INLINE const int8_t *parts_at(const integers_t *x, long block, long k)
{
    return x->parts + (k / x->unit * x->blocks + block) * 2 * x->height * x->unit + k % x->unit;
}

/* What a group says of 16 columns; low is what FOUR_BITS add for each unit of x. */
typedef struct {
    f32x16 scale, low;
} group_t;

INLINE f32x16 float16s(const uint16_t *from)
{
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif defined(__F16C__)
    __m256 halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + 8 * i)));
    f32x16 to;
    memcpy(&to, halves, sizeof to);
    return to;
#else
    f32x16 to;
    for (int i = 0; i < INTERLEAVED; i++)
        to[i] = fp16_to_float(from[i]);
    return to;
#endif
}

INLINE f32x16 uint8s(const uint8_t *from)
{
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(__AVX2__)
    __m256 halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(from + 8 * i))));
    f32x16 to;
    memcpy(&to, halves, sizeof to);
    return to;
#else
    f32x16 to;
    for (int i = 0; i < INTERLEAVED; i++)
        to[i] = from[i];
    return to;
#endif
}

/* NF4's blocks are numbered row by row. */
INLINE f32x16 nf4_scales(const weights_t *w, long strip, long group)
{
    long groups = w->in / w->group, at = (strip * groups + group) * INTERLEAVED;
    const float *nested = w->zeros, *map = w->extra, *offset = w->more;
    if (!nested)
        return *(const f32x16 *)((const float *)w->scales + at);
    const uint8_t *shares = (const uint8_t *)w->scales + at;
#ifdef __AVX512F__
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i rows = _mm512_add_epi32(_mm512_set1_epi32((int)(strip * INTERLEAVED)), places);
    rows = _mm512_min_epi32(rows, _mm512_set1_epi32((int)w->out - 1));
    __m512i blocks = _mm512_add_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32((int)groups)), _mm512_set1_epi32((int)group));
    __m512 outer = _mm512_i32gather_ps(_mm512_srli_epi32(blocks, 8), nested, 4);
    __m512 inner = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)shares)), map, 4);
    return (f32x16)_mm512_fmadd_ps(inner, outer, _mm512_set1_ps(*offset));
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 halves[2];
    for (int i = 0; i < 2; i++) {
        __m256i rows = _mm256_add_epi32(_mm256_set1_epi32((int)(strip * INTERLEAVED + 8 * i)), places);
        rows = _mm256_min_epi32(rows, _mm256_set1_epi32((int)w->out - 1));
        __m256i blocks = _mm256_mullo_epi32(rows, _mm256_set1_epi32((int)groups));
        blocks = _mm256_add_epi32(blocks, _mm256_set1_epi32((int)group));
        __m256 outer = _mm256_i32gather_ps(nested, _mm256_srli_epi32(blocks, 8), 4);
        __m256 inner = _mm256_i32gather_ps(map, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(shares + 8 * i))), 4);
        halves[i] = _mm256_fmadd_ps(inner, outer, _mm256_set1_ps(*offset));
    }
    f32x16 to;
    memcpy(&to, halves, sizeof to);
    return to;
#else
    f32x16 to;
    for (long i = 0; i < INTERLEAVED; i++) {
        long row = strip * INTERLEAVED + i < w->out ? strip * INTERLEAVED + i : w->out - 1;
        to[i] = map[shares[i]] * nested[(row * groups + group) / 256] + *offset;
    }
    return to;
#endif
}

INLINE group_t group_of(const kind_t kind, const weights_t *w, long strip, long group)
{
    const uint16_t *scales = w->scales;
    long at = (strip * (kind == INT4 ? w->count : w->in / w->group) + group) * INTERLEAVED;
    group_t g = {0};
    switch (kind) {
    case INT8:
        g.scale = *(const f32x16 *)((const float *)w->scales + strip * INTERLEAVED);
        break;
    case INT4:
        g.scale = float16s(scales + at);
        g.low = -g.scale * uint8s((const uint8_t *)w->zeros + at);
        break;
    case NF4:
        g.scale = nf4_scales(w, strip, group) * (16.0f / (float)finest(LEVELS));
        break;
    case Q4_1:
        g.scale = float16s(scales + 2 * at);
        g.low = float16s(scales + 2 * at + INTERLEAVED);
        break;
    case Q4_0:
        g.scale = float16s(scales + at);
        g.low = g.scale * -8;
        break;
    default:
        g.scale = float16s(scales + at);
    }
    return g;
}

/* Adds a chunk to the sums of one row: `high` are those of FOUR_BITS, or of high or p high; `low` the others. */
INLINE f32x16 combine(const codes_t codes, f32x16 y, i32x16 high, i32x16 low, const group_t *g, number_t n)
{
    if (codes == FOUR_BITS)
        return y + __builtin_convertvector(high, f32x16) * (g->scale * n.scale) + g->low * n.shift;
    u32x16 whole = ((u32x16)high << (codes == EIGHT_BITS ? 8 : 4)) + (u32x16)low - (uint32_t)n.sum;
    return y + __builtin_convertvector((i32x16)whole, f32x16) * (g->scale * n.scale);
}

INLINE u8x64 look_up(u8x64 codes, const uint8_t table[16])
{
#ifdef __AVX512BW__
    __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    return (u8x64)_mm512_shuffle_epi8(wide, (__m512i)codes);
#else
    uint8_t bytes[64];
    memcpy(bytes, &codes, sizeof bytes);
    for (int i = 0; i < 64; i++)
        bytes[i] = table[bytes[i]];
    return *(const u8x64 *)bytes;
#endif
}

/* Codes of four depths, the i-th of SHARE / 4, as products take them: for the high and for the low part of x. */
INLINE void read_codes(const codes_t codes, const uint8_t *from, int i, const uint8_t levels[2][16], u8x64 to[2])
{
    u8x64 bytes = *(const u8x64 *)(from + (codes == EIGHT_BITS ? i : i % 4) * 64);
    u32x16 fours = (u32x16)bytes; /* processors shift no bytes */
    if (codes == FOUR_BITS) {
        to[0] = (u8x64)(fours << (i < 4 ? 4 : 0) & 0xf0f0f0f0);
        to[1] = (u8x64)(fours >> (i < 4 ? 0 : 4) & 0x0f0f0f0f);
    } else if (codes == LEVELS) {
        u8x64 code = (u8x64)(fours >> (i < 4 ? 0 : 4) & 0x0f0f0f0f);
        to[0] = look_up(code, levels[0]);
        to[1] = look_up(code, levels[1]);
    } else {
        to[0] = to[1] = bytes;
    }
}

/* Bytes of SHARE depths of a strip. */
INLINE long share_bytes(const codes_t codes) { return SHARE * INTERLEAVED / (codes == EIGHT_BITS ? 1 : 2); }

/* Writes one row of 16 columns, after INT8's outlier columns, whose codes are MIDDLE. */
INLINE void finish_row(const linear_t *c, f32x16 y, long row, long strip)
{
    const weights_t *w = c->packed;
    if (w->kind == INT8)
        for (long i = 0; i < w->count; i++)
            y += load_half((const uint16_t *)w->extra + (strip * w->count + i) * INTERLEAVED) *
                 c->x[row * c->in + ((const int32_t *)w->zeros)[i]];
    long width = c->out - strip * INTERLEAVED;
    size_t floats = (size_t)(width < INTERLEAVED ? width : INTERLEAVED);
    memcpy(c->y + row * c->out + strip * INTERLEAVED, &y, floats * sizeof(float));
}

#endif
