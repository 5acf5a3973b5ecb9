/* Decoders for processors with AVX-512 and its bfloat16: what decode.c does, 32 values at a time. */
#include "quantized.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>

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

/* Adds a row's outliers to the depths [k, k + count). */
INLINE void add_outliers(const weights_t *w, long row, long k, long count, float *values)
{
    const int32_t *offsets = w->scales;
    const uint32_t *outliers = w->zeros;
    for (long i = offsets[row]; i < offsets[row + 1]; i += 16) {
        __mmask16 there = (__mmask16)(offsets[row + 1] - i < 16 ? (1 << (offsets[row + 1] - i)) - 1 : 0xffff);
        __m512i columns = _mm512_and_si512(_mm512_maskz_loadu_epi32(there, outliers + i), _mm512_set1_epi32(0xffff));
        columns = _mm512_sub_epi32(columns, _mm512_set1_epi32((int)k));
        uint32_t inside = _mm512_mask_cmplt_epu32_mask(there, columns, _mm512_set1_epi32((int)count));
        for (; inside; inside &= inside - 1) {
            uint32_t outlier = outliers[i + __builtin_ctz(inside)];
            values[(outlier & 0xffff) - k] += fp16_to_float((uint16_t)(outlier >> 16));
        }
    }
}

/* One tile after the other, 16 columns each: codes of 3 bits from bit 6 of a word on. */
INLINE void wide_spqr(const weights_t *w, long row, long k, long count, uint16_t *to)
{
    const uint64_t *words = (const uint64_t *)(w->codes + row * w->row_bytes) + k / 16;
    const uint16_t *numbers = (const uint16_t *)w->extra + (row / 16 * (w->row_bytes / 8) + k / 16) * 4;
    const __m512i places = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21);
    float values[PIECE];
    for (long i = 0; i < count; i += 16, words++, numbers += 4) {
        float n[4];
        _mm_storeu_ps(n, _mm_cvtph_ps(_mm_loadu_si64(numbers)));
        float scale = n[0] * ((float)(*words & 7) - n[2]), zero = n[1] * ((float)(*words >> 3 & 7) - n[3]);
        __m512i halves = _mm512_mask_set1_epi32(_mm512_set1_epi32((int)(*words >> 6)), 0xff00, (int)(*words >> 30));
        __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(halves, places), _mm512_set1_epi32(7));
        __m512 shifted = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(zero));
        _mm512_storeu_ps(values + i, _mm512_mul_ps(shifted, _mm512_set1_ps(scale)));
    }
    add_outliers(w, row, k, count, values);
    for (long i = 0; i < count; i += RUN, to += STEP)
        store(to, _mm512_loadu_ps(values + i), _mm512_loadu_ps(values + i + 16));
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
