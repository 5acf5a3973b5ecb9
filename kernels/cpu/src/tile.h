/* The one inner loop of every product: y[rows][32] += x[rows][depth] * w[depth][32].
 *
 * Each element of y is one chain of fused multiply-adds over increasing depth. Nothing else decides its bits, so
 * a row's result is the same in any batch, and a chain may be cut anywhere: stored, loaded and continued.
 * Vectors are 16 floats wide whatever the hardware has; lanes never meet. */
#ifndef PETAL_TILE_H
#define PETAL_TILE_H

#include <stdint.h>
#include <string.h>

typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t u8x64 __attribute__((vector_size(64), aligned(4), may_alias));

enum {
    LANES = 16,
    PANEL = 32, /* columns of a tile */
/* REGISTER: floats of a register. Where vectors are wider than that, compilers keep sums in memory. */
#ifdef __AVX512F__
    REGISTER = 16,
    TILE = 12, /* most rows of a tile: 24 accumulators of 32 registers */
    STREAM_ROWS = 6, /* most rows of a tile that walks several panels at once */
    STREAM_PANELS = 4, /* most panels walked at once */
#elif defined(__AVX2__)
    REGISTER = 8,
    TILE = 3, /* 12 accumulators of 16 registers */
    STREAM_ROWS = 1,
    STREAM_PANELS = 3,
#elif defined(__x86_64__)
    REGISTER = 4,
    TILE = 1, /* 8 accumulators of 16 registers */
    STREAM_ROWS = 1,
    STREAM_PANELS = 1,
#else
    REGISTER = 4,
    TILE = 3, /* 24 accumulators of 32 registers */
    STREAM_ROWS = 1,
    STREAM_PANELS = 3,
#endif
    STREAM_AHEAD = 2048 /* bytes; hides memory latency where a panel is read once */
};

/* What to fetch into the cache while a tile runs: `lines` cache lines for every 8 steps of depth, from `next` on. */
typedef struct {
    const char *next;
    long lines;
} ahead_t;

/* y continues from its stored value, or from start[32] where start is given. Distances between rows (x_row, w_row,
 * y_row) are in elements; x_step, between steps of depth, is 1, or `rows` where x_row is 1. In tile_half w is
 * w[depth / 2][32][2] in bfloat16. */
void tile_float(long rows, long depth, const float *x, long x_row, long x_step, const float *w, long w_row, float *y,
                long y_row, const float *start, ahead_t ahead);
void tile_half(long rows, long depth, const float *x, long x_row, long x_step, const uint16_t *w, float *y, long y_row,
               const float *start, ahead_t ahead);

/* Panels that `rows` rows walk at once; 0 where they are too many for it. */
int stream_width(long rows);
/* One tile over stream_width(rows) panels, w_panel bytes apart, at their full depth. Columns of y follow each other. */
void tile_stream(long rows, long half, long depth, const float *x, long x_row, const char *w, long w_panel, float *y,
                 long y_row, const float *start);

/* Height of the next tile of `left` rows: tiles of nearly one height, none above TILE. */
static inline long tile_rows(long left)
{
    long tiles = (left + TILE - 1) / TILE;
    return (left + tiles - 1) / tiles;
}

static inline f32x16 load_half(const uint16_t *p)
{
    u32x16 wide = __builtin_convertvector(*(const u16x16 *)p, u32x16) << 16;
    return (f32x16)wide;
}

static inline float half_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t float_to_half(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

#endif
