/* Products with packed weights: y[rows][out] = x[rows][in] * w^T + bias. */
#include "linear.h"

enum {
    AHEAD = 2 * PIECE, /* depth */
    LINE = 64,
    TOO_SMALL = 32 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
};

static long least(long a, long b) { return a < b ? a : b; }

/* How far the codes that are AHEAD of a piece lie: in the same row, or in the row of the next panel. */
static long distance_ahead(const weights_t *w, long k)
{
    long next = k + AHEAD, wraps = next >= w->in;
    next -= wraps ? (w->in + PIECE - 1) / PIECE * PIECE : 0;
    return (next < 0 ? 0 : next * w->row_bytes / w->in) + (wraps ? PANEL * w->row_bytes : 0);
}

long decode_panel(const weights_t *w, long panel, long k, uint16_t *to)
{
    long first = panel * PANEL, rows = least(PANEL, w->out - first), count = least(PIECE, w->in - k);
    const uint8_t *next = w->codes + first * w->row_bytes + distance_ahead(w, k);
    long lines = w->row_bytes * PIECE / w->in / LINE + 1;
    if (!decode_wide(w, first, rows, k, count, to, next, lines))
        decode(w, first, rows, k, count, to);
    return (count + RUN - 1) / RUN;
}

/* Nonzero, with y unfinished, where memory lacks. bias is padded to whole panels. */
int petal_quantized(float *y, const float *x, const weights_t *w, const float *bias, long rows, long threads)
{
    linear_t c = {.y = y, .x = x, .packed = w, .bias = bias, .rows = rows, .in = w->in, .out = w->out, .half = true};
    c.depth = (w->in + RUN - 1) / RUN * RUN;
    if (!rows)
        return 0;
    threads = rows * w->in * w->out < TOO_SMALL ? 1 : threads;
    return amx_ready() ? amx_run_packed(&c, threads) : run_tiles(&c, threads);
}
