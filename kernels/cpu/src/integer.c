#include "integer.h"
#include "scratch.h"

#include "thread_pool.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define PAIRED 1 /* products of 16 bits, two of them added: x and codes have room there */
#else
#define PAIRED 0
#endif

enum {
#if defined(__AVX512F__) || PAIRED
    FEW = 4,               /* rows that share a visit to codes */
#else
    FEW = 1,               /* more would not fit the registers */
#endif
    TALL = 16,             /* rows of a block for the matrix unit */
    WIDE = 4,              /* panels of a chunk of work */
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

/* The largest magnitude, as bits of a float, whose order is theirs. */
static uint32_t largest(const float *x, long count)
{
    uint32_t top = 0;
    for (long i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

typedef struct {
    int32_t all, high;
} sums_t;

/* Neighbours of a row, within one unit of depth. */
INLINE sums_t round_run(const codes_t codes, const float *x, long count, float inverse, int8_t *high, int8_t *low)
{
    const int bits = codes == EIGHT_BITS ? 8 : 4;
    sums_t sums = {0};
    for (long i = 0; i < count; i++) {
        int32_t value = (int32_t)rintf(x[i] * inverse), upper = (value + (1 << (bits - 1))) >> bits;
        high[i] = (int8_t)upper;
        low[i] = (int8_t)(value - (upper * (1 << bits)));
        sums.all += value;
        sums.high += upper;
    }
    return sums;
}

/* A chunk of one row, zeros before. A row with an infinity or no number gets a scale that is none. */
INLINE number_t round_chunk(const codes_t codes, const integers_t *x, const float *from, long k, long count, long block,
                            long m)
{
    const float tiny = 0x1p-100f;
    uint32_t top = largest(from, count);
    float most;
    memcpy(&most, &top, sizeof most);
    if (!(most < INFINITY))
        return (number_t){.scale = NAN};
    if (most < tiny)
        return (number_t){0};
    number_t number = {.scale = most / (float)finest(codes)};
    sums_t sums = {0};
    for (long i = 0; i < count; i += x->unit) {
        int8_t *high = (int8_t *)parts_at(x, block, k + i) + m * 64;
        sums_t more = round_run(codes, from + i, least(x->unit, count - i), (float)finest(codes) / most, high, high + x->apart);
        sums.all += more.all;
        sums.high += more.high;
    }
    if (codes == FOUR_BITS)
        number.shift = number.scale * (float)sums.all;
    else
        number.sum = MIDDLE * sums.all + (codes == LEVELS ? SLIGHT * sums.high : 0);
    return number;
}

static void round_block(void *job, long block)
{
    product_t *p = job;
    const linear_t *c = &p->call;
    const integers_t *x = &p->x;
    const codes_t codes = codes_of((kind_t)c->packed->kind);
    long rows = least(x->height, c->rows - block * x->height);
    if (rows < x->height || c->in < x->depth)
        for (long k = 0; k < x->depth; k += x->unit)
            memset((int8_t *)parts_at(x, block, k), 0, (size_t)(2 * x->height * x->unit));
    for (long m = 0; m < rows; m++) {
        const float *from = c->x + (block * x->height + m) * c->in;
        number_t *number = x->numbers + block * x->height + m;
        for (long k = 0, deep; k < c->in; k += deep, number += x->blocks * x->height) {
            deep = chunk_depth(c->packed, x->depth, k);
            long count = least(deep, c->in - k);
            switch (codes) {
            case FOUR_BITS:
                *number = round_chunk(FOUR_BITS, x, from + k, k, count, block, m);
                break;
            case EIGHT_BITS:
                *number = round_chunk(EIGHT_BITS, x, from + k, k, count, block, m);
                break;
            case LEVELS:
                *number = round_chunk(LEVELS, x, from + k, k, count, block, m);
            }
        }
    }
}

#if PAIRED
/* 32 depths of a row: of each four the even ones, then the odd ones, 16 bits each. */
INLINE void pair_up(__m256i values, int32_t pairs[SHARE / 4])
{
    values = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(values, 0xd8), 0xd8);
    _mm256_storeu_si256((void *)pairs, values);
}

/* x as products take it: whole, or for LEVELS high and low apart. */
typedef struct {
    int32_t whole[SHARE / 2], low[SHARE / 2];
} paired_t;

INLINE void pair_share(const codes_t codes, const int8_t *high, const int8_t *low, paired_t *to)
{
    for (int i = 0; i < 2; i++) {
        __m256i upper = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(high + 16 * i)));
        __m256i lower = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(low + 16 * i)));
        if (codes == LEVELS)
            pair_up(lower, to->low + 8 * i);
        else
            upper = _mm256_add_epi16(_mm256_slli_epi16(upper, codes == EIGHT_BITS ? 8 : 4), lower);
        pair_up(upper, to->whole + 8 * i);
    }
}

/* Four depths of 8 columns, even and odd apart; of LEVELS 16 p + q, and p beside it. */
typedef struct {
    __m256i even, odd, even_p, odd_p;
} quads_t;

INLINE quads_t read_quads(const codes_t codes, const uint8_t *from, int i, int half, const uint8_t levels[2][16])
{
    __m256i bytes = _mm256_loadu_si256((const void *)(from + (codes == EIGHT_BITS ? i : i % 4) * 64 + half * 32));
    const __m256i byte = _mm256_set1_epi16(255);
    if (codes != EIGHT_BITS)
        bytes = _mm256_and_si256(i < 4 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    quads_t to = {_mm256_and_si256(bytes, byte), _mm256_srli_epi16(bytes, 8), bytes, bytes};
    if (codes == LEVELS) {
        __m256i p = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)levels[0])), bytes);
        __m256i q = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)levels[1])), bytes);
        to.even_p = _mm256_and_si256(p, byte), to.odd_p = _mm256_srli_epi16(p, 8);
        to.even = _mm256_add_epi16(_mm256_slli_epi16(to.even_p, 4), _mm256_and_si256(q, byte));
        to.odd = _mm256_add_epi16(_mm256_slli_epi16(to.odd_p, 4), _mm256_srli_epi16(q, 8));
    }
    return to;
}

INLINE __m256i add_pairs(__m256i sum, __m256i even, __m256i odd, const int32_t pairs[2])
{
    even = _mm256_madd_epi16(even, _mm256_set1_epi32(pairs[0]));
    odd = _mm256_madd_epi16(odd, _mm256_set1_epi32(pairs[1]));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

/* A chunk of few rows and 16 columns, as `combine` takes its sums: one of all that is counted. */
INLINE void sum_chunk(const codes_t codes, const int rows, const product_t *p, long block, long k, long deep,
                      const uint8_t *from, i32x16 first[FEW], i32x16 second[FEW])
{
    __m256i added[FEW][2];
    for (int m = 0; m < rows; m++)
        added[m][0] = added[m][1] = _mm256_setzero_si256();
    for (long j = k; j < k + deep; j += SHARE, from += share_bytes(codes)) {
        const int8_t *parts = parts_at(&p->x, block, j);
        paired_t x[FEW];
        for (int m = 0; m < rows; m++)
            pair_share(codes, parts + m * 64, parts + m * 64 + p->x.apart, x + m);
        for (long line = 0; line < share_bytes(codes); line += 64)
            __builtin_prefetch(from + AHEAD + line, 0, 3);
#pragma GCC unroll 8
        for (int i = 0; i < SHARE / 4; i++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                quads_t quads = read_quads(codes, from, i, half, p->levels);
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    added[m][half] = add_pairs(added[m][half], quads.even, quads.odd, x[m].whole + 2 * i);
                    if (codes == LEVELS)
                        added[m][half] = add_pairs(added[m][half], quads.even_p, quads.odd_p, x[m].low + 2 * i);
                }
            }
    }
    for (int m = 0; m < rows; m++) {
        first[m] = second[m] = (i32x16){0};
        memcpy((codes == FOUR_BITS ? first : second) + m, added[m], sizeof added[m]);
    }
}
#else
/* A chunk of few rows and 16 columns, as `combine` takes its sums. */
INLINE void sum_chunk(const codes_t codes, const int rows, const product_t *p, long block, long k, long deep,
                      const uint8_t *from, i32x16 first[FEW], i32x16 second[FEW])
{
    i32x16 high[FEW][2] = {0}, low[FEW][2] = {0}; /* in turn: a sum waits for the one before */
    for (long j = k; j < k + deep; j += SHARE, from += share_bytes(codes)) {
        const int8_t *parts = parts_at(&p->x, block, j);
        for (long line = 0; line < share_bytes(codes); line += 64)
            __builtin_prefetch(from + AHEAD + line, 0, 3);
#pragma GCC unroll 8
        for (int i = 0; i < SHARE / 4; i++) {
            u8x64 u[2];
            read_codes(codes, from, i, p->levels, u);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const int8_t *upper = parts + m * 64 + i * 4, *lower = upper + p->x.apart;
                high[m][i % 2] = dot(high[m][i % 2], u[0], upper);
                low[m][i % 2] = dot(low[m][i % 2], u[codes == FOUR_BITS], lower);
                if (codes == LEVELS)
                    low[m][1 - i % 2] = dot(low[m][1 - i % 2], u[1], upper);
            }
        }
    }
    for (int m = 0; m < rows; m++) {
        first[m] = high[m][0] + high[m][1], second[m] = low[m][0] + low[m][1];
        if (codes == FOUR_BITS)
            first[m] += second[m];
    }
}
#endif

/* Few rows of a block and 16 columns: codes meet x in registers. */
INLINE void run_rows(const kind_t kind, const int rows, const product_t *p, long block, long strip)
{
    const linear_t *c = &p->call;
    const integers_t *x = &p->x;
    const weights_t w = *c->packed;
    const codes_t codes = codes_of(kind);
    const uint8_t *from = w.codes + strip * w.row_bytes * INTERLEAVED;
    const number_t *numbers = x->numbers + block * x->height;
    f32x16 y[FEW];
    for (int m = 0; m < rows; m++)
        y[m] = *(const f32x16 *)(c->bias + strip * INTERLEAVED);
    for (long k = 0, deep; k < c->in; k += deep, numbers += x->blocks * x->height) {
        deep = chunk_depth(&w, x->depth, k);
        i32x16 first[FEW], second[FEW];
        sum_chunk(codes, rows, p, block, k, deep, from, first, second);
        from += deep / SHARE * share_bytes(codes);
        group_t g = group_of(kind, &w, strip, k / w.group);
        for (int m = 0; m < rows; m++)
            y[m] = combine(codes, y[m], first[m], second[m], &g, numbers[m]);
    }
    for (int m = 0; m < rows; m++)
        finish_row(c, y[m], block * x->height + m, strip);
}

INLINE void run_kind(const kind_t kind, const product_t *p, long block, long strip)
{
    switch (FEW == 1 ? 1 : least(p->x.height, p->call.rows - block * p->x.height)) {
    case 1:
        return run_rows(kind, 1, p, block, strip);
    case 2:
        return run_rows(kind, 2, p, block, strip);
    case 3:
        return run_rows(kind, 3, p, block, strip);
    default:
        return run_rows(kind, FEW, p, block, strip);
    }
}

static void run_strip(const product_t *p, long block, long strip)
{
    switch ((kind_t)p->call.packed->kind) {
    case INT8:
        return run_kind(INT8, p, block, strip);
    case INT4:
        return run_kind(INT4, p, block, strip);
    case NF4:
        return run_kind(NF4, p, block, strip);
    case Q4_0:
        return run_kind(Q4_0, p, block, strip);
    case Q4_1:
        return run_kind(Q4_1, p, block, strip);
    default:
        return run_kind(Q8_0, p, block, strip);
    }
}

static void run_chunk(void *job, long chunk)
{
    const product_t *p = job;
    part_t part = part_of(&p->call, chunk);
    long strips = least(part.to * PANEL / INTERLEAVED, (p->call.out + INTERLEAVED - 1) / INTERLEAVED);
    for (long strip = part.from * PANEL / INTERLEAVED; strip < strips; strip++)
        for (long block = 0; block < p->x.blocks; block++)
            run_strip(p, block, strip);
}

static void read_levels(product_t *p)
{
    const float *levels = (const float *)p->call.packed->more + 1;
    for (int i = 0; i < 16; i++) {
        int level = (int)rintf(levels[i] * (float)finest(LEVELS)), high = (level + SLIGHT) >> 4;
        p->levels[0][i] = (uint8_t)(high + MIDDLE);
        p->levels[1][i] = (uint8_t)(level - 16 * high + SLIGHT);
    }
}

/* Decides how x is laid out; false where memory lacks. */
static bool lay_out(product_t *p, bool unit)
{
    integers_t *x = &p->x;
    long rows = p->call.rows, tallest = unit ? TALL : FEW;
    x->unit = p->call.packed->group < 64 ? 32 : 64;
    x->blocks = (rows + tallest - 1) / tallest;
    x->height = (rows + x->blocks - 1) / x->blocks;
    x->depth = (p->call.in + x->unit - 1) / x->unit * x->unit;
    x->apart = x->unit == 32 ? 32 : x->height * 64;
    long padded = x->blocks * x->height, bytes = 2 * padded * x->depth;
    x->parts = scratch(ROWS, bytes + x->depth / x->unit * padded * (long)sizeof *x->numbers);
    x->numbers = (number_t *)(x->parts + bytes);
    return x->parts;
}

/* Nonzero, with y unfinished, where memory lacks. bias is padded to whole panels. */
int petal_integer(float *y, const float *x, const weights_t *w, const float *bias, long rows, long threads)
{
    product_t p = {.call = {.y = y, .x = x, .packed = w, .bias = bias, .rows = rows, .in = w->in, .out = w->out}};
    bool unit = rows > FEW && amx_ready();
    if (!rows)
        return 0;
    if (!lay_out(&p, unit))
        return 1;
    threads = rows * w->in * w->out < TOO_SMALL ? 1 : threads;
    if (w->kind == NF4)
        read_levels(&p);
    p.call.wide = WIDE;
    p.call.height = rows;
    run_chunks(threads, p.x.blocks, round_block, &p);
    if (unit)
        amx_run_integer(&p, threads);
    else
        run_chunks(threads, count_parts(&p.call), run_chunk, &p);
    return 0;
}
