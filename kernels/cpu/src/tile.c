#include "tile.h"

#define INLINE static inline __attribute__((always_inline))

typedef float f32s __attribute__((vector_size(REGISTER * 4), aligned(4), may_alias));
typedef uint32_t u32s __attribute__((vector_size(REGISTER * 4), aligned(4), may_alias));

enum { PARTS = PANEL / REGISTER }; /* registers of a row of a tile */

/* Step k of depth. */
INLINE void load_panel(const void *w, long k, long w_row, int half, f32s column[PARTS])
{
    const u32s *pairs = (const u32s *)((const uint16_t *)w + (k & ~1L) * w_row);
    const f32s *floats = (const f32s *)((const float *)w + k * w_row);
    int shift = k & 1 ? 0 : 16; /* the even step is the lower half of each pair */
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; n++)
        column[n] = half ? (f32s)(pairs[n] << shift & 0xffff0000) : floats[n];
}

INLINE void load_sums(f32s sum[PARTS], const float *from)
{
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; n++)
        sum[n] = ((const f32s *)from)[n];
}

INLINE void store_sums(float *to, const f32s sum[PARTS])
{
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; n++)
        ((f32s *)to)[n] = sum[n];
}

/* Without it compilers load every scale of a step first and run out of registers: a third of the speed. */
#ifdef __AVX512F__
#define PIN(a) __asm__ volatile("" : "+v"(a))
#else
#define PIN(a) (void)0
#endif

/* rows and half are constants at every call: the accumulators become registers. */
INLINE void tile(const int rows, const int half, long depth, const float *x, long x_row, long x_step, const void *w,
                 long w_row, float *y, long y_row, const float *start, ahead_t ahead)
{
    f32s sum[TILE][PARTS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        load_sums(sum[m], start ? start : y + m * y_row);
    for (long k = 0; k < depth;) {
        long stop = k + 8 < depth ? k + 8 : depth;
        for (long i = 0; i < ahead.lines; i++, ahead.next += 64)
            __builtin_prefetch(ahead.next, 0, 3);
        for (; k < stop; k++) {
            f32s column[PARTS];
            load_panel(w, k, w_row, half, column);
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                float scale = x[m * x_row + k * x_step];
#pragma GCC unroll 8
                for (int n = 0; n < PARTS; n++) {
                    sum[m][n] += column[n] * scale;
                    PIN(sum[m][n]);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        store_sums(y + m * y_row, sum[m]);
}

/* A single tile reads its panels once, so memory is the limit: `wide` panels are walked side by side, each a stream
 * of its own for the hardware. The chain of every element is the same as above. */
INLINE void stream(const int rows, const int wide, const int half, long depth, const float *x, long x_row,
                   const char *w, long w_panel, float *y, long y_row, const float *start)
{
    const long line = PANEL * (half ? 2 : 4);
    f32s sum[STREAM_ROWS][STREAM_PANELS][PARTS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int p = 0; p < wide; p++)
            load_sums(sum[m][p], start + p * PANEL);
    for (long k = 0; k < depth; k++) {
        f32s column[STREAM_PANELS][PARTS];
#pragma GCC unroll 8
        for (int p = 0; p < wide; p++) {
            const char *from = w + p * w_panel;
            for (long byte = 0; byte < line; byte += 64)
                __builtin_prefetch(from + k * line + STREAM_AHEAD + byte, 0, 3);
            load_panel(from, k, PANEL, half, column[p]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            float scale = x[m * x_row + k];
#pragma GCC unroll 8
            for (int p = 0; p < wide; p++)
#pragma GCC unroll 8
                for (int n = 0; n < PARTS; n++) {
                    sum[m][p][n] += column[p][n] * scale;
                    PIN(sum[m][p][n]);
                }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int p = 0; p < wide; p++)
            store_sums(y + m * y_row + p * PANEL, sum[m][p]);
}

/* Packed tiles have their own case: there the distance between steps is a constant too. */
#define ROWS(n, half)                                                            \
    case n:                                                                      \
        if (x_row == 1 && x_step == n)                                           \
            tile(n, half, depth, x, 1, n, w, w_row, y, y_row, start, ahead);     \
        else                                                                     \
            tile(n, half, depth, x, x_row, 1, w, w_row, y, y_row, start, ahead); \
        break;
#ifdef __AVX512F__
#define ANY_ROWS(half)                                                                                            \
    ROWS(1, half) ROWS(2, half) ROWS(3, half) ROWS(4, half) ROWS(5, half) ROWS(6, half) ROWS(7, half) ROWS(8, half) \
    ROWS(9, half) ROWS(10, half) ROWS(11, half) ROWS(12, half)
#elif defined(__x86_64__) && !defined(__AVX2__)
#define ANY_ROWS(half) ROWS(1, half)
#else
#define ANY_ROWS(half) ROWS(1, half) ROWS(2, half) ROWS(3, half)
#endif

void tile_float(long rows, long depth, const float *x, long x_row, long x_step, const float *w, long w_row, float *y,
                long y_row, const float *start, ahead_t ahead)
{
    switch (rows) { ANY_ROWS(0) }
}

void tile_half(long rows, long depth, const float *x, long x_row, long x_step, const uint16_t *w, float *y, long y_row,
               const float *start, ahead_t ahead)
{
    const long w_row = PANEL;
    switch (rows) { ANY_ROWS(1) }
}

#define STREAM(n, wide)                                                             \
    case n:                                                                         \
        if (half)                                                                   \
            stream(n, wide, 1, depth, x, x_row, w, w_panel, y, y_row, start);       \
        else                                                                        \
            stream(n, wide, 0, depth, x, x_row, w, w_panel, y, y_row, start);       \
        break;

void tile_stream(long rows, long half, long depth, const float *x, long x_row, const char *w, long w_panel, float *y,
                long y_row, const float *start)
{
    switch (rows) {
#ifdef __AVX512F__
        STREAM(1, 4) STREAM(2, 4) STREAM(3, 3) STREAM(4, 3) STREAM(5, 2) STREAM(6, 2)
#else
        STREAM(1, STREAM_PANELS)
#endif
    }
}

int stream_width(long rows)
{
#ifdef __AVX512F__
    return rows > STREAM_ROWS ? 0 : rows <= 2 ? 4 : rows <= 4 ? 3 : 2;
#else
    return rows > STREAM_ROWS ? 0 : STREAM_PANELS;
#endif
}
