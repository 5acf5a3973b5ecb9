/* Decoders for processors with AVX-512 and its bfloat16: what decode.c does, 32 values at a time. */
#include "quantized.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)

#include <immintrin.h>
#include <stdbool.h>

#define INLINE static inline __attribute__((always_inline))

/* 32 neighbours. */
INLINE void store(uint16_t *to, __m512 low, __m512 high)
{
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

INLINE __m512 bytes(const uint8_t *from)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
}

INLINE __m512 signed_bytes(const uint8_t *from)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
}

/* The float16 numbers that a block begins with, in the lowest lanes. */
INLINE __m128 head(const uint8_t *block)
{
    int32_t pair;
    memcpy(&pair, block, sizeof pair);
    return _mm_cvtph_ps(_mm_cvtsi32_si128(pair));
}

/* The exact weight of a column before its outlier. */
INLINE float spqr_weight(const uint64_t *words, const uint16_t *numbers, long column)
{
    float n[4];
    uint64_t word = words[column / 16];
    _mm_storeu_ps(n, _mm_cvtph_ps(_mm_loadu_si64(numbers + column / 16 * 4)));
    float scale = n[0] * ((float)(word & 7) - n[2]), zero = n[1] * ((float)(word >> 3 & 7) - n[3]);
    return ((float)(word >> (6 + column % 16 * 3) & 7) - zero) * scale;
}

/* Weights of [k, k + count) of a row that have outliers, again; those of one column follow each other. */
INLINE void add_outliers(const weights_t *w, long row, long k, long count, const uint64_t *words,
                         const uint16_t *numbers, uint16_t *to)
{
    const int32_t *offsets = w->scales;
    const uint32_t *outliers = w->zeros;
    long last = -1;
    float value = 0;
    for (long i = offsets[row]; i < offsets[row + 1]; i += 16) {
        __mmask16 there = (__mmask16)(offsets[row + 1] - i < 16 ? (1 << (offsets[row + 1] - i)) - 1 : 0xffff);
        __m512i columns = _mm512_and_si512(_mm512_maskz_loadu_epi32(there, outliers + i), _mm512_set1_epi32(0xffff));
        columns = _mm512_sub_epi32(columns, _mm512_set1_epi32((int)k));
        uint32_t inside = _mm512_mask_cmplt_epu32_mask(there, columns, _mm512_set1_epi32((int)count));
        for (; inside; inside &= inside - 1) {
            uint32_t outlier = outliers[i + __builtin_ctz(inside)];
            long column = (outlier & 0xffff) - k;
            value = column == last ? value : spqr_weight(words, numbers, column);
            value += fp16_to_float((uint16_t)(outlier >> 16));
            to[column / RUN * STEP + column % RUN] = float_to_half(value);
            last = column;
        }
    }
}

/* Four tiles at once, 16 columns each: codes of 3 bits from bit 6 of a word on, which a table of 8 weights a tile reads. */
INLINE void wide_spqr(const weights_t *w, long row, long k, long count, uint16_t *to)
{
    const uint64_t *words = (const uint64_t *)(w->codes + row * w->row_bytes) + k / 16;
    const uint16_t *numbers = (const uint16_t *)w->extra + (row / 16 * (w->row_bytes / 8) + k / 16) * 4;
    const __m512i pairs = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const __m512i grid_bits = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 3, 0, 3)), low3 = _mm512_set1_epi32(7);
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 48, 51));
    const __m512i tables = _mm512_setr_epi32(0, 0, 0, 0, 0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x10101010,
                                             0x10101010, 0x10101010, 0x10101010, 0x18181818, 0x18181818, 0x18181818,
                                             0x18181818);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
    const __m512i zero = _mm512_set1_epi32(1), second = _mm512_set1_epi32(8);
    const __m512 units = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    uint16_t *out = to;
    for (long i = 0; i < count; i += 2 * RUN, out += 2 * STEP) {
        bool half = count - i < 2 * RUN;
        __m256i four = _mm256_maskz_loadu_epi64(half ? 3 : 15, words + i / 16);
        __m512 n = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(half ? 0xff : 0xffff, numbers + i / 4));
        __m512i twice = _mm512_permutexvar_epi64(pairs, _mm512_castsi256_si512(four));
        __m512i grid = _mm512_srlv_epi32(_mm512_shuffle_epi32(twice, _MM_PERM_AAAA), grid_bits);
        /* Of each four lanes the first two: the tile's scale and zero in this row. */
        __m512 both = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(grid, low3)), _mm512_permute_ps(n, 0xee));
        both = _mm512_mul_ps(both, n);
        __m512 low = _mm512_sub_ps(units, _mm512_permutexvar_ps(_mm512_add_epi32(first, zero), both));
        __m512i third = _mm512_add_epi32(first, second);
        __m512 high = _mm512_sub_ps(units, _mm512_permutexvar_ps(_mm512_add_epi32(third, zero), both));
        low = _mm512_mul_ps(low, _mm512_permutexvar_ps(first, both));
        high = _mm512_mul_ps(high, _mm512_permutexvar_ps(third, both));
        __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        __m512i codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(places, twice), _mm512_set1_epi8(7));
        codes = _mm512_or_si512(codes, tables);
        __m512i index = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
        if (half)
            break;
        index = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1));
        _mm512_storeu_si512(out + STEP, _mm512_permutexvar_epi16(index, table));
    }
    add_outliers(w, row, k, count, words, numbers, to);
}

/* Scales and minima of the eight groups of a K block, times the block's own: [0] the scales, [1] the minima. */
INLINE void k_scales(const uint8_t *block, float to[2][8])
{
    uint32_t p[3], low[4];
    memcpy(p, block + 4, sizeof p);
    low[0] = p[0] & 0x3f3f3f3f;
    low[1] = (p[2] & 0x0f0f0f0f) | (p[0] >> 2 & 0x30303030);
    low[2] = p[1] & 0x3f3f3f3f;
    low[3] = (p[2] >> 4 & 0x0f0f0f0f) | (p[1] >> 2 & 0x30303030);
    __m128 both = head(block);
    __m512 whole = _mm512_insertf32x8(_mm512_broadcastss_ps(both), _mm256_broadcastss_ps(_mm_movehdup_ps(both)), 1);
    _mm512_storeu_ps(to, _mm512_mul_ps(bytes((const uint8_t *)low), whole));
}

/* 16 codes, their fifth bits from bit `place` of as many bytes where there are any. */
INLINE __m512 k_codes(const uint8_t *codes, int shift, const uint8_t *high, int place, int mask)
{
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)codes));
    low = _mm512_and_si512(_mm512_srli_epi32(low, (unsigned)shift), _mm512_set1_epi32(15));
    if (high) {
        __m512i more = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)high));
        more = _mm512_and_si512(_mm512_srli_epi32(more, (unsigned)place), _mm512_set1_epi32(mask));
        low = _mm512_or_si512(low, _mm512_slli_epi32(more, 4));
    }
    return _mm512_cvtepi32_ps(low);
}

INLINE void wide_k(const uint8_t *block, const uint8_t *codes, const uint8_t *fifth, uint16_t *to)
{
    float scales[2][8];
    k_scales(block, scales);
    for (int group = 0; group < 8; group++, to += STEP) {
        const uint8_t *from = codes + group / 2 * 32, *more = fifth ? fifth + 16 : 0;
        __m512 scale = _mm512_set1_ps(scales[0][group]), low = _mm512_set1_ps(scales[1][group]);
        store(to, _mm512_fmsub_ps(k_codes(from, group % 2 * 4, fifth, group, 1), scale, low),
              _mm512_fmsub_ps(k_codes(from + 16, group % 2 * 4, more, group, 1), scale, low));
    }
}

INLINE void wide_q4_k(const weights_t *w, long row, long k, uint16_t *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 144;
    wide_k(block, block + 16, 0, to);
}

INLINE void wide_q5_k(const weights_t *w, long row, long k, uint16_t *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 176;
    wide_k(block, block + 48, block + 16, to);
}

INLINE void wide_q6_k(const weights_t *w, long row, long k, uint16_t *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 210;
    __m512 whole = _mm512_set1_ps(fp16_at(block + 208)), middle = _mm512_set1_ps(32);
    float scales[16];
    _mm512_storeu_ps(scales, _mm512_mul_ps(signed_bytes(block + 192), whole));
    for (int group = 0; group < 8; group++, to += STEP) {
        const uint8_t *codes = block + group / 4 * 64 + group % 2 * 32, *high = block + 128 + group / 4 * 32;
        int shift = group / 2 % 2 * 4, place = group % 4 * 2;
        __m512 low = _mm512_sub_ps(k_codes(codes, shift, high, place, 3), middle);
        __m512 rest = _mm512_sub_ps(k_codes(codes + 16, shift, high + 16, place, 3), middle);
        store(to, _mm512_mul_ps(low, _mm512_set1_ps(scales[2 * group])),
              _mm512_mul_ps(rest, _mm512_set1_ps(scales[2 * group + 1])));
    }
}

/* books and wide are constants where it matters. */
INLINE void wide_aqlm(const weights_t *w, long row, long k, long count, uint16_t *to, const long books,
                      const int wide)
{
    const uint8_t *codes = w->codes + (row * w->in + k) / 8 * books * (1 + wide);
    __m256 scale = _mm256_set1_ps(fp16_to_float(((const uint16_t *)w->scales)[row]));
    for (long i = 0; i < count; i += RUN, to += STEP)
#pragma GCC unroll 4
        for (long j = 0; j < RUN; j += 8) {
            __m256 sum = _mm256_setzero_ps();
#pragma GCC unroll 2
            for (long c = 0; c < books; c++, codes += 1 + wide) {
                long code = wide ? codes[0] | codes[1] << 8 : codes[0];
                const uint16_t *vector = (const uint16_t *)w->extra + ((c << w->group) + code) * 8;
                sum = _mm256_add_ps(sum, _mm256_cvtph_ps(_mm_loadu_si128((const void *)vector)));
            }
            _mm_storeu_si128((void *)(to + j), (__m128i)_mm256_cvtneps_pbh(_mm256_mul_ps(sum, scale)));
        }
}

/* All rows of a piece: what does not change from row to row stays in registers. */
#define ROWS_OF(call)                                                                        \
    {                                                                                        \
        for (long row = first; row < first + rows; row++, to += RUN, next += c.row_bytes) {  \
            for (long line = 0; line < lines; line++)                                        \
                __builtin_prefetch(next + line * 64, 0, 3);                                  \
            call;                                                                            \
        }                                                                                    \
        return 1;                                                                            \
    }

int decode_wide(const weights_t *w, long first, long rows, long k, long count, uint16_t *to, const uint8_t *next,
                long lines)
{
    const weights_t c = *w; /* a copy: stores could change *w for all that a compiler knows */
    if (count % RUN)
        return 0;
    switch ((kind_t)c.kind) {
    case Q4_K:
        ROWS_OF(wide_q4_k(&c, row, k, to))
    case Q5_K:
        ROWS_OF(wide_q5_k(&c, row, k, to))
    case Q6_K:
        ROWS_OF(wide_q6_k(&c, row, k, to))
    case AQLM:
        if (c.count == 2 && c.group <= 8)
            ROWS_OF(wide_aqlm(&c, row, k, count, to, 2, 0))
        if (c.count == 1 && c.group > 8)
            ROWS_OF(wide_aqlm(&c, row, k, count, to, 1, 1))
        ROWS_OF(wide_aqlm(&c, row, k, count, to, c.count, c.group > 8))
    case SPQR:
        ROWS_OF(wide_spqr(&c, row, k, count, to))
    default:
        return 0;
    }
    return 0;
}

#else

int decode_wide(const weights_t *w, long first, long rows, long k, long count, uint16_t *to, const uint8_t *next,
                long lines)
{
    return (void)w, (void)first, (void)rows, (void)k, (void)count, (void)to, (void)next, (void)lines, 0;
}

#endif
