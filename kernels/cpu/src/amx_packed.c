/* Products with packed weights on the matrix unit.
 *
 * Decoded weights come row by row, so they are the left factor: a register holds 16 rows of w, 32 deep. x, which is
 * smaller, is laid out in pairs of depth. An instruction adds to y^T[16][16] what amx.c has it add to y[16][16], in the
 * same order. */
#include "linear.h"
#include "scratch.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include "amx.h"
#include "thread_pool.h"

enum {
    BLOCK = 2 * HEIGHT,    /* rows of x that share a visit to decoded weights */
    CACHED = 1024 * 1024,  /* bytes of decoded weights that stay in the second-level cache */
    WIDEST = 8,            /* panels decoded together where rows are many */
};

/* Registers, by number as the instructions want them: sums of 16 columns each for the low and the high half of a block
 * of rows, 16 columns each of w, both halves of x. */
#define LOW_0 0
#define LOW_1 1
#define HIGH_0 2
#define HIGH_1 3
#define W_0 4
#define W_1 5
#define X_LOW 6
#define X_HIGH 7

static long least(long a, long b) { return a < b ? a : b; }

/* HEIGHT rows of x as bfloat16: pairs[depth / 2][rows][2]. */
static void pack_pairs(void *job, long half)
{
    const linear_t *c = job;
    long first = half * HEIGHT, rows = least(HEIGHT, c->rows - first);
    uint16_t *pairs = (uint16_t *)c->tiles + first * c->depth;
    for (long row = 0; row < rows; row++) {
        const float *from = c->x + (first + row) * c->in;
        uint16_t *to = pairs + row * 2;
        for (long k = 0; k < c->depth; k += LANES) {
            __mmask16 valid = (__mmask16)(c->in - k >= LANES ? 0xffff : k < c->in ? (1 << (c->in - k)) - 1 : 0);
            union {
                __m256bh vector;
                uint32_t pairs[8];
            } rounded = {_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(valid, from + k))};
            for (long pair = 0; pair < LANES / 2; pair++, to += rows * 2)
                memcpy(to, rounded.pairs + pair, sizeof *rounded.pairs);
        }
    }
}

/* What one block of rows adds up for a panel. */
typedef struct {
    const linear_t *call;
    const uint16_t *x_low, *x_high;
    long row, low, high;
} block_t;

static block_t block_of(const linear_t *c, long row)
{
    long low = least(HEIGHT, c->rows - row), high = least(HEIGHT, c->rows - row - low);
    const uint16_t *pairs = (const uint16_t *)c->tiles + row * c->depth;
    configure((long[8]){HEIGHT, HEIGHT, HEIGHT, HEIGHT, HEIGHT, HEIGHT, HEIGHT, HEIGHT},
              (long[8]){low * 4, low * 4, high * 4, high * 4, LINE, LINE, low * 4, high * 4});
    return (block_t){c, pairs, pairs + low * c->depth, row, low, high};
}

/* Sums begin with the bias. */
static void begin(const block_t *b, const float *bias)
{
    float start[PANEL * HEIGHT] __attribute__((aligned(LINE)));
    for (long i = 0; i < PANEL; i++)
        _mm512_store_ps(start + i * HEIGHT, _mm512_set1_ps(bias[i]));
    publish(start);
    _tile_loadd(LOW_0, start, LINE);
    _tile_loadd(LOW_1, start + HEIGHT * HEIGHT, LINE);
    if (b->high) {
        _tile_loadd(HIGH_0, start, LINE);
        _tile_loadd(HIGH_1, start + HEIGHT * HEIGHT, LINE);
    }
}

static void add_products(const block_t *b, const uint16_t *w, long k, long steps)
{
    const uint16_t *x_low = b->x_low + k * b->low, *x_high = b->x_high + k * b->high;
    publish(w);
    for (; steps--; w += STEP, x_low += RUN * b->low, x_high += RUN * b->high) {
        _tile_loadd(W_0, w, LINE);
        _tile_loadd(W_1, w + STEP / 2, LINE);
        _tile_loadd(X_LOW, x_low, b->low * 4);
        _tile_dpbf16ps(LOW_0, W_0, X_LOW);
        _tile_dpbf16ps(LOW_1, W_1, X_LOW);
        if (b->high) {
            _tile_loadd(X_HIGH, x_high, b->high * 4);
            _tile_dpbf16ps(HIGH_0, W_0, X_HIGH);
            _tile_dpbf16ps(HIGH_1, W_1, X_HIGH);
        }
    }
}

/* y from sums[PANEL][rows]. */
static void write_rows(const linear_t *c, const float *sums, long row, long rows, long column)
{
    long width = least(PANEL, c->out - column);
    float *y = c->y + row * c->out + column;
    for (long m = 0; m < rows; m++, y += c->out)
        for (long i = 0; i < width; i++)
            y[i] = sums[i * rows + m];
}

static void finish(const block_t *b, long panel)
{
    float sums[PANEL * HEIGHT] __attribute__((aligned(LINE)));
    _tile_stored(LOW_0, sums, b->low * 4);
    _tile_stored(LOW_1, sums + HEIGHT * b->low, b->low * 4);
    write_rows(b->call, sums, b->row, b->low, panel * PANEL);
    if (b->high) {
        _tile_stored(HIGH_0, sums, b->high * 4);
        _tile_stored(HIGH_1, sums + HEIGHT * b->high, b->high * 4);
        write_rows(b->call, sums, b->row + b->low, b->high, panel * PANEL);
    }
}

/* Few rows: a piece is used as soon as it is decoded, from the first-level cache. */
static void run_pieces(const linear_t *c, long from, long to)
{
    uint16_t piece[PIECE * PANEL] __attribute__((aligned(LINE)));
    block_t block = block_of(c, 0);
    for (long panel = from; panel < to; panel++) {
        begin(&block, c->bias + panel * PANEL);
        for (long k = 0; k < c->in; k += PIECE)
            add_products(&block, piece, k, decode_panel(c->packed, panel, k, piece));
        finish(&block, panel);
    }
}

/* Many rows: whole panels are decoded, and then meet them block by block. */
static void run_panels(const linear_t *c, long from, long to, uint16_t *room)
{
    uint16_t *decoded = room;
    for (long panel = from; panel < to; panel++)
        for (long k = 0; k < c->in; k += PIECE)
            decoded += decode_panel(c->packed, panel, k, decoded) * STEP;
    for (long row = 0; row < c->rows; row += BLOCK) {
        block_t block = block_of(c, row);
        for (long panel = from; panel < to; panel++) {
            begin(&block, c->bias + panel * PANEL);
            add_products(&block, room + (panel - from) * c->depth * PANEL, 0, c->depth / RUN);
            finish(&block, panel);
        }
    }
}

static void run_chunk(void *job, long chunk)
{
    linear_t *c = job;
    part_t part = part_of(c, chunk);
    if (c->rows <= BLOCK) {
        run_pieces(c, part.from, part.to);
    } else {
        uint16_t *room = scratch(WEIGHTS, c->wide * c->depth * PANEL * 2);
        if (room)
            run_panels(c, part.from, part.to, room);
        else
            __atomic_store_n(&c->failed, true, __ATOMIC_RELAXED);
    }
    _tile_release();
}

int amx_run_packed(linear_t *c, long threads)
{
    long panels = (c->out + PANEL - 1) / PANEL;
    c->tiles = scratch(ROWS, c->rows * c->depth * 2);
    if (!c->tiles)
        return 1;
    c->height = c->rows;
    c->wide = c->rows <= BLOCK ? 1 : least(WIDEST, CACHED / (c->depth * PANEL * 2));
    c->wide = least(c->wide, panels / (2 * threads));
    c->wide = c->wide < 1 ? 1 : c->wide;
    run_chunks(threads, (c->rows + HEIGHT - 1) / HEIGHT, pack_pairs, c);
    run_chunks(threads, count_parts(c), run_chunk, c);
    return c->failed;
}

#else

int amx_run_packed(linear_t *c, long threads) { return (void)c, (void)threads, 1; }

#endif
