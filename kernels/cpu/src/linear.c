#include "linear.h"

#include "scratch.h"
#include "thread_pool.h"

enum {
    DEPTH = PIECE,         /* depth of one visit to a panel: 24 KiB of it stay in the first-level cache */
    CACHED = 192 * 1024,   /* floats of x that stay in the second level */
    LOWEST = 96,           /* rows that share a visit even if x does not fit */
    MANY = 48,             /* rows from which packing x pays */
    TOO_SMALL = 32 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
};

/* One tile, for the panels that reach past `out` through a private copy. */
static void run_tile(const linear_t *c, long row, long rows, long k, long depth, const char *w, long column,
                     ahead_t ahead)
{
    const float *x = c->tiles ? (float *)c->tiles + row * c->in + k * rows : c->x + row * c->in + k;
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
        tile_half(rows, depth, x, x_row, x_step, (const uint16_t *)w, y, y_row, start, ahead);
    else
        tile_float(rows, depth, x, x_row, x_step, (const float *)w, PANEL, y, y_row, start, ahead);
    if (width < PANEL)
        for (long m = 0; m < rows; m++)
            memcpy(c->y + (row + m) * c->out + column, edge + m * PANEL, (size_t)width * sizeof *y);
}

/* A piece of a panel that is packed, as bfloat16 panels have it. */
static const char *unpack(const linear_t *c, long panel, long k, uint32_t *to)
{
    uint16_t rows[PIECE * PANEL];
    long steps = decode_panel(c->packed, panel, k, rows);
    for (long step = 0; step < steps; step++, to += RUN / 2 * PANEL)
        for (long row = 0; row < PANEL; row++)
            for (long pair = 0; pair < RUN / 2; pair++)
                memcpy(to + pair * PANEL + row, rows + (step * PANEL + row) * RUN + pair * 2, sizeof *to);
    return (const char *)(to - steps * RUN / 2 * PANEL);
}

/* Rows [first, last) of one panel. While the tiles share one piece of the panel, the next piece is fetched. */
static void run_panel(const linear_t *c, long panel, long first, long last)
{
    uint32_t room[PIECE / 2 * PANEL];
    long line = PANEL * (c->half ? 2 : 4);
    for (long k = 0; k < c->in; k += DEPTH) {
        long depth = c->in - k < DEPTH ? c->in - k : DEPTH;
        const char *w = c->packed ? unpack(c, panel, k, room) : c->panels + (panel * c->depth + k) * line;
        long tiles = (last - first + TILE - 1) / TILE;
        long lines = c->packed ? 0 : (line / 8 + tiles - 1) / tiles;
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
        float *tile = (float *)c->tiles + row * c->in;
        for (long m = 0; m < rows; m++)
            for (long k = 0; k < c->in; k++)
                tile[k * rows + m] = c->x[(row + m) * c->in + k];
    }
}

static void round_row(void *job, long row)
{
    const linear_t *c = job;
    const float *from = c->x + row * c->in;
    float *to = (float *)c->tiles + row * c->in;
    for (long k = 0; k < c->in; k++)
        to[k] = half_to_float(float_to_half(from[k]));
}

/* Whole panels [from, to) for the few rows of one tile; returns the first panel that is left. */
static long run_streams(const linear_t *c, long from, long to)
{
    long wide = stream_width(c->rows), w_panel = c->depth * PANEL * (c->half ? 2 : 4);
    for (; from + wide <= to && (from + wide) * PANEL <= c->out; from += wide)
        tile_stream(c->rows, c->half, c->in, c->x, c->in, c->panels + from * w_panel, w_panel, c->y + from * PANEL,
                    c->out, c->bias + from * PANEL);
    return from;
}

static void run_chunk(void *job, long chunk)
{
    const linear_t *c = job;
    part_t part = part_of(c, chunk);
    long panel = part.from;
    if (c->wide > 1)
        panel = run_streams(c, panel, part.to);
    for (; panel < part.to; panel++)
        run_panel(c, panel, part.first, part.last);
}

int run_tiles(linear_t *c, long threads)
{
    bool many = c->rows > MANY;
    long values = c->rows * c->in;
    float *room = c->half || many ? scratch(ROWS, values * (c->half + many) * (long)sizeof *room) : 0;
    if ((c->half || many) && !room)
        return 1;
    c->wide = stream_width(c->rows) && !c->packed ? stream_width(c->rows) : 1;
    c->height = CACHED / c->in > LOWEST ? CACHED / c->in / TILE * TILE : LOWEST;
    if (c->half) {
        c->tiles = room;
        run_chunks(threads, c->rows, round_row, c);
        c->x = room;
        room += values;
    }
    c->tiles = many ? room : 0;
    if (many)
        run_chunks(threads, (c->rows + c->height - 1) / c->height, pack_block, c);
    run_chunks(threads, count_parts(c), run_chunk, c);
    return 0;
}

int petal_matrix_unit(void) { return amx_ready(); }

/* Nonzero, with y unfinished, where memory lacks. */
int petal_linear(float *y, const float *x, const void *panels, const float *bias, long in, long out, long half,
                 long rows, long threads)
{
    linear_t c = {.y = y, .x = x, .panels = panels, .bias = bias, .rows = rows, .in = in, .out = out};
    c.depth = half ? (in + DEPTH_UNIT - 1) / DEPTH_UNIT * DEPTH_UNIT : in;
    c.half = half;
    if (!rows)
        return 0;
    threads = rows * in * out < TOO_SMALL ? 1 : threads;
    if (!half || !amx_ready())
        return run_tiles(&c, threads);
    c.tiles = scratch(ROWS, rows * c.depth * 2);
    if (!c.tiles)
        return 1;
    amx_run(&c, threads);
    return 0;
}
