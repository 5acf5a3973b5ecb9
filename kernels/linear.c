/* y[rows][out] = x[rows][in] * w^T + bias, w packed as panels[ceil(out / 32)][in][32]. */
#include "crew.h"
#include "tile.h"

#include <stdlib.h>

enum {
    DEPTH = 256,           /* depth of one visit to a panel: 24 KiB of it stay in the first-level cache */
    CACHED = 192 * 1024,   /* floats of x that stay in the second level */
    LOWEST = 96,           /* rows that share a visit even if x does not fit */
    MANY = 48,             /* rows from which packing x pays */
    TOO_SMALL = 32 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
};

typedef struct {
    float *y;
    const float *x;
    const char *panels;
    const float *bias; /* padded to whole panels */
    long rows, in, out;
    long half;         /* panels are bfloat16 */
    long wide, height; /* panels and rows of a chunk */
    float *tiles;      /* x again, tile by tile as [in][rows], where many tiles read it; else null */
} linear_t;

/* One tile, for the panels that reach past `out` through a private copy. */
static void run_tile(const linear_t *c, long row, long rows, long k, long depth, const char *w, long column,
                     ahead_t ahead)
{
    const float *x = c->tiles ? c->tiles + row * c->in + k * rows : c->x + row * c->in + k;
    long x_row = c->tiles ? 1 : c->in, x_step = c->tiles ? rows : 1;
    const float *start = k ? 0 : c->bias + column;
    float *y = c->y + row * c->out + column;
    long y_row = c->out, width = c->out - column;
    float edge[TILE * PANEL];
    if (width < PANEL) {
        for (long m = 0; k && m < rows; m++)
            memcpy(edge + m * PANEL, y + m * y_row, (size_t)width * sizeof *y);
        y = edge;
        y_row = PANEL;
    }
    if (c->half)
        tile_half(rows, depth, x, x_row, x_step, (const uint16_t *)w, PANEL, y, y_row, start, ahead);
    else
        tile_float(rows, depth, x, x_row, x_step, (const float *)w, PANEL, y, y_row, start, ahead);
    if (width < PANEL)
        for (long m = 0; m < rows; m++)
            memcpy(c->y + (row + m) * c->out + column, edge + m * PANEL, (size_t)width * sizeof *y);
}

/* Rows [first, last) of one panel. While the tiles share one piece of the panel, the next piece is fetched. */
static void run_panel(const linear_t *c, long panel, long first, long last)
{
    long line = PANEL * (c->half ? 2 : 4);
    for (long k = 0; k < c->in; k += DEPTH) {
        long depth = c->in - k < DEPTH ? c->in - k : DEPTH;
        const char *w = c->panels + (panel * c->in + k) * line;
        long tiles = (last - first + TILE - 1) / TILE;
        long lines = (line / 8 + tiles - 1) / tiles;
        ahead_t ahead = {w + (tiles > 1 ? depth * line : STREAM_AHEAD), lines};
        for (long row = first, rows; row < last; row += rows) {
            rows = tile_rows(last - row);
            run_tile(c, row, rows, k, depth, w, panel * PANEL, ahead);
            ahead.next += (depth + 7) / 8 * lines * 64;
        }
    }
}

/* Writes the tiles of one block of rows: side by side, the values of a step of depth share a cache line. */
static void pack_block(void *job, long block)
{
    const linear_t *c = job;
    long first = block * c->height, last = first + c->height < c->rows ? first + c->height : c->rows;
    for (long row = first, rows; row < last; row += rows) {
        rows = tile_rows(last - row);
        float *tile = c->tiles + row * c->in;
        for (long m = 0; m < rows; m++)
            for (long k = 0; k < c->in; k++)
                tile[k * rows + m] = c->x[(row + m) * c->in + k];
    }
}

/* Room for packed tiles, kept by each calling thread: fresh memory would cost a fault a page. */
static float *scratch(long floats)
{
    static __thread float *room;
    static __thread long size;
    if (floats > size) {
        free(room);
        room = malloc((size_t)floats * sizeof *room);
        size = room ? floats : 0;
    }
    return room;
}

/* Whole panels [from, to) for the few rows of one tile; returns the first panel that is left. */
static long run_streams(const linear_t *c, long from, long to)
{
    long wide = stream_width(c->rows), w_panel = c->in * PANEL * (c->half ? 2 : 4);
    for (; from + wide <= to && (from + wide) * PANEL <= c->out; from += wide)
        tile_stream(c->rows, c->half, c->in, c->x, c->in, c->panels + from * w_panel, w_panel, c->y + from * PANEL,
                    c->out, c->bias + from * PANEL);
    return from;
}

/* A chunk is `wide` panels for a block of rows. */
static void run_chunk(void *job, long chunk)
{
    const linear_t *c = job;
    long count = (c->out + PANEL - 1) / PANEL, across = (count + c->wide - 1) / c->wide;
    long from = chunk % across * c->wide, to = from + c->wide < count ? from + c->wide : count;
    long first = chunk / across * c->height, last = first + c->height < c->rows ? first + c->height : c->rows;
    if (stream_width(c->rows))
        from = run_streams(c, from, to);
    for (; from < to; from++)
        run_panel(c, from, first, last);
}

void petal_linear(float *y, const float *x, const void *panels, const float *bias, long in, long out, long half,
                  long rows, long threads)
{
    linear_t c = {y, x, panels, bias, rows, in, out, half};
    c.wide = stream_width(rows) ? stream_width(rows) : 1;
    c.height = CACHED / in > LOWEST ? CACHED / in / TILE * TILE : LOWEST;
    long across = ((out + PANEL - 1) / PANEL + c.wide - 1) / c.wide;
    long chunks = (rows + c.height - 1) / c.height * across;
    threads = rows * in * out < TOO_SMALL ? 1 : threads;
    if (rows > MANY && (c.tiles = scratch(rows * in)))
        crew_run(threads, (rows + c.height - 1) / c.height, pack_block, &c);
    crew_run(threads, chunks, run_chunk, &c);
}
