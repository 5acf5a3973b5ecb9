/* Products in integers on the matrix unit: registers hold a part of 16 rows of x, 16 columns of codes, or their sums. */
#include "integer.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)

#include "amx.h"
#include "thread_pool.h"

enum {
    PLANE = FINE * INTERLEAVED,  /* bytes of a chunk's codes for one part of x, where they are decoded */
    TOGETHER = 64,        /* rows whose sums stay in the first-level cache */
    SUMS = 16 * INTERLEAVED,     /* of a register */
};

/* Registers, by number as the instructions want them: sums for the high and the low part, or of two blocks, of both strips
 * of a panel; x; codes of both strips. */
#define HIGH_0 0
#define HIGH_1 1
#define LOW_0 2
#define LOW_1 3
#define X_0 4
#define X_1 5
#define W_0 6
#define W_1 7

static long least(long a, long b) { return a < b ? a : b; }

/* A chunk's codes as bytes by strip and part of x; in units of 32 both parts of a unit follow each other. */
typedef struct {
    const uint8_t *high[2], *low[2];
} planes_t;

INLINE planes_t decode_planes(const kind_t kind, const product_t *p, long panel, long k, long deep,
                              uint8_t room[2][2 * PLANE])
{
    const weights_t *w = p->call.packed;
    const codes_t codes = codes_of(kind);
    const bool stacked = codes == FOUR_BITS && p->x.unit == 32;
    planes_t planes;
    for (int side = 0; side < 2; side++) {
        long strip = least(2 * panel + side, (w->out + INTERLEAVED - 1) / INTERLEAVED - 1);
        const uint8_t *from = w->codes + strip * w->row_bytes * INTERLEAVED + k / SHARE * share_bytes(codes);
        planes.high[side] = planes.low[side] = from;
        if (codes == EIGHT_BITS)
            continue;
        planes.high[side] = room[side];
        planes.low[side] = room[side] + (stacked ? SHARE * INTERLEAVED : PLANE);
        uint8_t *high = room[side], *low = high + (planes.low[side] - planes.high[side]);
        for (long j = 0; j < deep; j += SHARE, from += share_bytes(codes))
#pragma GCC unroll 8
            for (int i = 0; i < SHARE / 4; i++) {
                u8x64 u[2];
                read_codes(codes, from, i, p->levels, u);
                *(u8x64 *)(high + j * INTERLEAVED + i * 64) = u[0];
                *(u8x64 *)(low + j * INTERLEAVED + i * 64) = u[1];
            }
    }
    publish(room);
    return planes;
}

/* FOUR_BITS: one sum a row, two blocks at once, the second `next` bytes behind the first if there is one. */
INLINE void multiply_codes(const planes_t *w, const integers_t *x, const int8_t *parts, long next, long deep)
{
    _tile_zero(HIGH_0);
    _tile_zero(HIGH_1);
    _tile_zero(LOW_0);
    _tile_zero(LOW_1);
    long stride = x->blocks * 2 * x->height * x->unit;
    for (long t = 0; t < deep; t += x->unit, parts += stride)
        for (int part = 0; part < (x->unit == 32 ? 1 : 2); part++) {
            const int8_t *rows = parts + part * x->apart;
            _tile_loadd(X_0, rows, 64);
            _tile_loadd(W_0, (part ? w->low : w->high)[0] + t * INTERLEAVED, 64);
            _tile_loadd(W_1, (part ? w->low : w->high)[1] + t * INTERLEAVED, 64);
            _tile_dpbsud(HIGH_0, X_0, W_0);
            _tile_dpbsud(HIGH_1, X_0, W_1);
            if (next) {
                _tile_loadd(X_1, rows + next, 64);
                _tile_dpbsud(LOW_0, X_1, W_0);
                _tile_dpbsud(LOW_1, X_1, W_1);
            }
        }
}

/* EIGHT_BITS and LEVELS: sums for the high and the low part of x. */
INLINE void multiply_parts(const codes_t codes, const planes_t *w, const integers_t *x, const int8_t *parts, long deep)
{
    _tile_zero(HIGH_0);
    _tile_zero(HIGH_1);
    _tile_zero(LOW_0);
    _tile_zero(LOW_1);
    long stride = x->blocks * 2 * x->height * x->unit;
    for (long t = 0; t < deep; t += x->unit, parts += stride) {
        _tile_loadd(X_0, parts, 64);
        _tile_loadd(X_1, parts + x->apart, 64);
        _tile_loadd(W_0, w->high[0] + t * INTERLEAVED, 64);
        _tile_loadd(W_1, w->high[1] + t * INTERLEAVED, 64);
        _tile_dpbsud(HIGH_0, X_0, W_0);
        _tile_dpbsud(HIGH_1, X_0, W_1);
        _tile_dpbsud(LOW_0, X_1, W_0);
        _tile_dpbsud(LOW_1, X_1, W_1);
        if (codes == LEVELS) {
            _tile_loadd(W_0, w->low[0] + t * INTERLEAVED, 64);
            _tile_loadd(W_1, w->low[1] + t * INTERLEAVED, 64);
            _tile_dpbsud(LOW_0, X_0, W_0);
            _tile_dpbsud(LOW_1, X_0, W_1);
        }
    }
}

INLINE void store_sums(int32_t *sums)
{
    _tile_stored(HIGH_0, sums, 64);
    _tile_stored(HIGH_1, sums + SUMS, 64);
    _tile_stored(LOW_0, sums + 2 * SUMS, 64);
    _tile_stored(LOW_1, sums + 3 * SUMS, 64);
}

/* Sums of one or two blocks over a chunk that wait to be added to y[2][TOGETHER][16]. */
typedef struct {
    long rows, second; /* of the blocks; second only with FOUR_BITS */
    const number_t *numbers;
    f32x16 *y;
    group_t g[2];
} pending_t;

INLINE void add_block(const codes_t codes, const pending_t *p, const int32_t *sums, long first, long rows)
{
    const group_t g[2] = {p->g[0], p->g[1]};
    for (long m = first; m < first + rows; m++, sums += INTERLEAVED)
        for (int side = 0; side < 2; side++) {
            const int32_t *high = sums + side * SUMS;
            i32x16 low = codes == FOUR_BITS ? (i32x16){0} : *(const i32x16 *)(high + 2 * SUMS);
            f32x16 *y = p->y + side * TOGETHER + m;
            *y = combine(codes, *y, *(const i32x16 *)high, low, g + side, p->numbers[m]);
        }
}

INLINE void add_pending(const codes_t codes, const pending_t *p, const int32_t *sums)
{
    add_block(codes, p, sums, 0, p->rows);
    if (codes == FOUR_BITS)
        add_block(codes, p, sums + 2 * SUMS, p->rows, p->second);
}

/* A panel for blocks [from, to) of rows. Sums are added while the unit works on the next ones, and codes are decoded a chunk
 * ahead: neither waits for what was just stored. */
INLINE void run_panel(const kind_t kind, const product_t *p, long panel, long from, long to)
{
    const linear_t *c = &p->call;
    const integers_t *x = &p->x;
    const weights_t w = *c->packed;
    const codes_t codes = codes_of(kind);
    const long first = from * x->height, rows = least(c->rows, to * x->height) - first;
    const long last = (w.out + INTERLEAVED - 1) / INTERLEAVED - 1;
    const long block_bytes = 2 * x->height * x->unit, step = codes == FOUR_BITS ? 2 * x->height : x->height;
    const number_t *numbers = x->numbers + first;
    uint8_t room[2][2][2 * PLANE] __attribute__((aligned(64)));
    int32_t sums[4 * SUMS] __attribute__((aligned(64)));
    f32x16 y[2 * TOGETHER] __attribute__((aligned(64)));
    for (int side = 0; side < 2; side++)
        for (long m = 0; m < rows; m++)
            y[side * TOGETHER + m] = *(const f32x16 *)(c->bias + panel * PANEL + side * INTERLEAVED);
    planes_t planes[2];
    pending_t pending = {0};
    long deep = chunk_depth(&w, x->depth, 0), odd = 0;
    planes[0] = decode_planes(kind, p, panel, 0, deep, room[0]);
    for (long k = 0, ahead; k < c->in; k += deep, deep = ahead, odd = !odd, numbers += x->blocks * x->height) {
        const int8_t *parts = parts_at(x, from, k);
        group_t g[2] = {group_of(kind, &w, 2 * panel, k / w.group),
                        group_of(kind, &w, least(2 * panel + 1, last), k / w.group)};
        ahead = k + deep < c->in ? chunk_depth(&w, x->depth, k + deep) : 0;
        for (long done = 0; done < rows; done += step, parts += step / x->height * block_bytes) {
            long second = codes == FOUR_BITS && rows - done > x->height ? least(x->height, rows - done - x->height) : 0;
            if (codes == FOUR_BITS)
                multiply_codes(planes + odd, x, parts, second ? block_bytes : 0, deep);
            else
                multiply_parts(codes, planes + odd, x, parts, deep);
            add_pending(codes, &pending, sums);
            if (!done && ahead)
                planes[!odd] = decode_planes(kind, p, panel, k + deep, ahead, room[!odd]);
            publish(sums);
            store_sums(sums);
            publish(sums);
            pending = (pending_t){least(x->height, rows - done), second, numbers + done, y + done, {g[0], g[1]}};
        }
    }
    add_pending(codes, &pending, sums);
    for (long m = 0; m < rows; m++)
        for (int side = 0; side < 2 && panel * PANEL + side * INTERLEAVED < c->out; side++)
            finish_row(c, y[side * TOGETHER + m], first + m, 2 * panel + side);
}

static void run_kind(const product_t *p, long panel, long from, long to)
{
    switch ((kind_t)p->call.packed->kind) {
    case INT8:
        return run_panel(INT8, p, panel, from, to);
    case INT4:
        return run_panel(INT4, p, panel, from, to);
    case NF4:
        return run_panel(NF4, p, panel, from, to);
    case Q4_0:
        return run_panel(Q4_0, p, panel, from, to);
    case Q4_1:
        return run_panel(Q4_1, p, panel, from, to);
    default:
        return run_panel(Q8_0, p, panel, from, to);
    }
}

static void run_chunk(void *job, long chunk)
{
    const product_t *p = job;
    const integers_t *x = &p->x;
    part_t part = part_of(&p->call, chunk);
    long stacked = codes_of((kind_t)p->call.packed->kind) == FOUR_BITS, deep = stacked ? 64 : x->unit;
    long h = x->height, blocks = TOGETHER / h;
    configure((long[8]){h, h, h, h, h, h, deep / 4, deep / 4}, (long[8]){64, 64, 64, 64, deep, deep, 64, 64});
    for (long panel = part.from; panel < part.to; panel++)
        for (long block = 0; block < x->blocks; block += blocks)
            run_kind(p, panel, block, least(block + blocks, x->blocks));
    _tile_release();
}

void amx_run_integer(product_t *p, long threads) { run_chunks(threads, count_parts(&p->call), run_chunk, p); }

#else

void amx_run_integer(product_t *p, long threads) { (void)p, (void)threads; }

#endif
