/* bfloat16 products on the matrix unit of Intel processors (AMX): tile registers of 16 rows of 64 bytes.
 *
 * One instruction adds to y[16][16] the products of x[16][32] and w[32][16]. What it adds to a row depends on that
 * row of x alone, so as with tile.h a row's result is the same in any batch; its order of sums is its own. */
#define _GNU_SOURCE
#include "linear.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include "amx.h"
#include "thread_pool.h"

#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    BLOCK = 2 * HEIGHT,            /* rows that share a visit to a panel */
    WIDTH = DEPTH_UNIT * PANEL * 2, /* bytes of a panel that one instruction's depth takes */
    AHEAD = 4096,                  /* bytes; hides memory latency where a panel is read once */
    WIDE = 2,                      /* panels of a chunk */
    CACHED = 1024 * 1024,          /* bytes of x that stay in the second-level cache */
    LOWEST = 256,                  /* rows that share a panel even if x does not fit */
    KEPT = 128 * 1024,             /* floats of y that stay in it for whoever reads them next */
};

/* Registers, by number as the instructions want them: sums of the low and the high half of a block for 16 columns
 * each, both halves of x, 16 columns each of w. */
#define LOW_0 0
#define LOW_1 1
#define HIGH_0 2
#define HIGH_1 3
#define X_LOW 4
#define X_HIGH 5
#define W_0 6
#define W_1 7

static bool allowed;

static void ask(void)
{
    const long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    allowed = !syscall(SYS_arch_prctl, request_permission, tile_data);
}

bool amx_ready(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask);
    return allowed;
}

static long least(long a, long b) { return a < b ? a : b; }

static void configure_block(long low, long high)
{
    configure((long[8]){low, low, high, high, low, high, HEIGHT, HEIGHT},
              (long[8]){LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE});
}

/* Half a block of x as bfloat16, step by step of depth: x[depth / 32][rows][32]. */
static void pack_rows(void *job, long half)
{
    const linear_t *c = job;
    long first = half * HEIGHT, rows = least(HEIGHT, c->rows - first);
    uint16_t *to = (uint16_t *)c->tiles + first * c->depth;
    for (long k = 0; k < c->depth; k += DEPTH_UNIT) {
        uint32_t valid = c->in - k < DEPTH_UNIT ? (1u << (c->in - k)) - 1 : 0xffffffff;
        for (long row = first; row < first + rows; row++, to += DEPTH_UNIT) {
            const float *from = c->x + row * c->in + k;
            __m512 low = _mm512_maskz_loadu_ps((__mmask16)valid, from);
            __m512 high = _mm512_maskz_loadu_ps((__mmask16)(valid >> 16), from + LANES);
            _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Leaves the sums of one block in the registers. */
static void add_products(const linear_t *c, long panel, long row, long low, long high, ahead_t ahead)
{
    const char *w = c->panels + panel * c->depth * PANEL * 2, *end = w + c->depth * PANEL * 2;
    const char *x_low = (const char *)c->tiles + row * c->depth * 2, *x_high = x_low + low * c->depth * 2;
    for (; w < end; w += WIDTH, x_low += low * LINE, x_high += high * LINE) {
        for (long i = 0; i < ahead.lines; i++, ahead.next += LINE)
            __builtin_prefetch(ahead.next, 0, 3);
        _tile_loadd(X_LOW, x_low, LINE);
        _tile_loadd(W_0, w, 2 * LINE);
        _tile_loadd(W_1, w + LINE, 2 * LINE);
        _tile_dpbf16ps(LOW_0, X_LOW, W_0);
        _tile_dpbf16ps(LOW_1, X_LOW, W_1);
        if (high) {
            _tile_loadd(X_HIGH, x_high, LINE);
            _tile_dpbf16ps(HIGH_0, X_HIGH, W_0);
            _tile_dpbf16ps(HIGH_1, X_HIGH, W_1);
        }
    }
}

/* Rows of y from sums of whole panels. Past the cache: what is read again is not pushed out, and what is written is
 * not read first. */
static void write_rows(const linear_t *c, const float *sums, long row, long rows, long column)
{
    long width = least(PANEL, c->out - column);
    float *y = c->y + row * c->out + column;
    bool past_cache = c->rows * c->out > KEPT && width == PANEL && !((uintptr_t)y % LINE) && c->out % LANES == 0;
    for (long m = 0; m < rows; m++, sums += PANEL, y += c->out)
        if (past_cache) {
            _mm512_stream_ps(y, _mm512_load_ps(sums));
            _mm512_stream_ps(y + LANES, _mm512_load_ps(sums + LANES));
        } else {
            memcpy(y, sums, (size_t)width * sizeof *y);
        }
}

/* Up to BLOCK rows of one panel. */
static void run_block(const linear_t *c, long panel, long row, long rows, ahead_t ahead)
{
    long low = least(HEIGHT, rows), high = rows - low;
    const float *bias = c->bias + panel * PANEL;
    float sums[BLOCK * PANEL] __attribute__((aligned(LINE)));
    configure_block(low, high);
    _tile_loadd(LOW_0, bias, 0); /* the same line for every row */
    _tile_loadd(LOW_1, bias + LANES, 0);
    if (high) {
        _tile_loadd(HIGH_0, bias, 0);
        _tile_loadd(HIGH_1, bias + LANES, 0);
    }
    add_products(c, panel, row, low, high, ahead);
    _tile_stored(LOW_0, sums, PANEL * 4);
    _tile_stored(LOW_1, sums + LANES, PANEL * 4);
    if (high) {
        _tile_stored(HIGH_0, sums + HEIGHT * PANEL, PANEL * 4);
        _tile_stored(HIGH_1, sums + HEIGHT * PANEL + LANES, PANEL * 4);
    }
    write_rows(c, sums, row, rows, panel * PANEL);
}

/* While blocks share a panel, the next panel is fetched. */
static void run_chunk(void *job, long chunk)
{
    const linear_t *c = job;
    part_t part = part_of(c, chunk);
    long blocks = (part.last - part.first + BLOCK - 1) / BLOCK, lines = (WIDTH / LINE + blocks - 1) / blocks;
    long panel_bytes = c->depth * PANEL * 2;
    for (long panel = part.from; panel < part.to; panel++) {
        ahead_t ahead = {c->panels + panel * panel_bytes + (blocks > 1 ? panel_bytes : AHEAD), lines};
        for (long row = part.first; row < part.last; row += BLOCK) {
            run_block(c, panel, row, least(BLOCK, part.last - row), ahead);
            ahead.next += c->depth / DEPTH_UNIT * lines * LINE;
        }
    }
    _tile_release();
    _mm_sfence(); /* writes past the cache keep no order of their own */
}

void amx_run(linear_t *c, long threads)
{
    c->wide = WIDE;
    c->height = CACHED / (c->depth * 2) > LOWEST ? CACHED / (c->depth * 2) / BLOCK * BLOCK : LOWEST;
    run_chunks(threads, (c->rows + HEIGHT - 1) / HEIGHT, pack_rows, c);
    run_chunks(threads, count_parts(c), run_chunk, c);
}

#else

bool amx_ready(void) { return false; }
void amx_run(linear_t *c, long threads) { (void)c, (void)threads; }

#endif
