#include "tile.h"

#define INLINE static inline __attribute__((always_inline))

INLINE void load_panel(const void *w, long at, int half, f32x16 *a, f32x16 *b)
{
    if (half) {
        const uint16_t *p = (const uint16_t *)w + at;
        *a = load_half(p);
        *b = load_half(p + LANES);
    } else {
        const float *p = (const float *)w + at;
        *a = *(const f32x16 *)p;
        *b = *(const f32x16 *)(p + LANES);
    }
}

/* Without it compilers load every scale of a step first and run out of registers: a third of the speed. */
#ifdef __AVX512F__
#define PIN(a, b) __asm__ volatile("" : "+v"(a), "+v"(b))
#else
#define PIN(a, b) (void)0
#endif

/* rows and half are constants at every call: the accumulators become registers. */
INLINE void tile(const int rows, const int half, long depth, const float *x, long x_row, const void *w, long w_row,
                 float *y, long y_row, const float *start, ahead_t ahead)
{
    f32x16 sum[TILE][2];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        const float *from = start ? start : y + m * y_row;
        sum[m][0] = *(const f32x16 *)from;
        sum[m][1] = *(const f32x16 *)(from + LANES);
    }
    for (long k = 0; k < depth;) {
        long stop = k + 8 < depth ? k + 8 : depth;
        for (long i = 0; i < ahead.lines; i++, ahead.next += 64)
            __builtin_prefetch(ahead.next, 0, 3);
        for (; k < stop; k++) {
            f32x16 a, b;
            load_panel(w, k * w_row, half, &a, &b);
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                float scale = x[m * x_row + k];
                sum[m][0] += a * scale;
                sum[m][1] += b * scale;
                PIN(sum[m][0], sum[m][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        *(f32x16 *)(y + m * y_row) = sum[m][0];
        *(f32x16 *)(y + m * y_row + LANES) = sum[m][1];
    }
}

#define ROWS(n, half)                                                     \
    case n:                                                               \
        tile(n, half, depth, x, x_row, w, w_row, y, y_row, start, ahead); \
        break;
#ifdef __AVX512F__
#define ANY_ROWS(half)                                                                                            \
    ROWS(1, half) ROWS(2, half) ROWS(3, half) ROWS(4, half) ROWS(5, half) ROWS(6, half) ROWS(7, half) ROWS(8, half) \
    ROWS(9, half) ROWS(10, half) ROWS(11, half) ROWS(12, half)
#else
#define ANY_ROWS(half) ROWS(1, half) ROWS(2, half) ROWS(3, half)
#endif

void tile_float(long rows, long depth, const float *x, long x_row, const float *w, long w_row, float *y, long y_row,
                const float *start, ahead_t ahead)
{
    switch (rows) { ANY_ROWS(0) }
}

void tile_half(long rows, long depth, const float *x, long x_row, const uint16_t *w, long w_row, float *y, long y_row,
               const float *start, ahead_t ahead)
{
    switch (rows) { ANY_ROWS(1) }
}
