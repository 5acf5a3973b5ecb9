/* Products in integers on the matrix unit: a register of x holds the high, then the low parts of a block of rows. */
#include "integer.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__) && !defined(PETAL_PORTABLE)

#include "amx.h"
#include "crew.h"

enum {
    PLANES = 2,                  /* NF4's levels have two bytes */
    LANE_BYTES = CHUNK * LANE,   /* of a chunk's codes */
    TOGETHER = 64,               /* rows whose sums stay in the first-level cache */
    SUMS = 16 * LANE,            /* of a register */
};

/* Registers, by number as the instructions want them: sums of both lanes of a panel, x, both lanes' codes. */
#define SUM_0 0
#define SUM_1 1
#define X 2
#define W_0 3
#define W_1 4

static long least(long a, long b) { return a < b ? a : b; }

typedef struct {
    const uint8_t *lanes[2][PLANES];
} codes_t;

/* The codes of a chunk as bytes: where they are, or decoded to `room`. */
INLINE codes_t codes_of(const kind_t kind, const weights_t *w, const uint8_t levels[2][16], long panel, long k, long deep,
                        uint8_t room[2][PLANES][LANE_BYTES])
{
    codes_t codes;
    for (int side = 0; side < 2; side++) {
        long lane = least(2 * panel + side, (w->out + LANE - 1) / LANE - 1);
        const uint8_t *from = w->codes + lane * w->row_bytes * LANE + k * (is_nibbles(kind) ? LANE / 2 : LANE);
        codes.lanes[side][0] = is_nibbles(kind) ? room[side][0] : from;
        codes.lanes[side][1] = room[side][1];
        for (long j = 0; is_nibbles(kind) && j < deep; j += SHARE, from += SHARE * LANE / 2) {
            u8x64 u[8];
            read_codes(true, from, u);
            for (int i = 0; i < 8; i++)
                for (int plane = 0; plane < (kind == NF4 ? PLANES : 1); plane++)
                    *(u8x64 *)(room[side][plane] + (j / 4 + i) * 64) =
                        kind == NF4 ? look_up(u[i], levels[plane]) : u[i];
        }
    }
    publish(room);
    return codes;
}

/* Sums of one block over a chunk for both lanes of a panel; x points at its first tile. */
INLINE void add_products(const codes_t *codes, int plane, const int8_t *x, long stride, long tiles, int32_t *sums)
{
    _tile_zero(SUM_0);
    _tile_zero(SUM_1);
    for (long t = 0; t < tiles; t++) {
        _tile_loadd(X, x + t * stride, TILE_DEPTH);
        _tile_loadd(W_0, codes->lanes[0][plane] + t * TILE_DEPTH * LANE, 64);
        _tile_loadd(W_1, codes->lanes[1][plane] + t * TILE_DEPTH * LANE, 64);
        _tile_dpbsud(SUM_0, X, W_0);
        _tile_dpbsud(SUM_1, X, W_1);
    }
    _tile_stored(SUM_0, sums, 64);
    _tile_stored(SUM_1, sums + SUMS, 64);
}

/* Adds the sums of a chunk to rows of y[2][TOGETHER][16]. */
INLINE void add_block(const kind_t kind, const integers_t *x, const int32_t sums[PLANES][2][SUMS], long at, long rows,
                      const group_t g[2], f32x16 *y)
{
    for (int side = 0; side < 2; side++)
        for (long m = 0; m < rows; m++) {
            i32x16 parts[PLANES];
            for (int plane = 0; plane < (kind == NF4 ? PLANES : 1); plane++)
                parts[plane] = whole(*(const i32x16 *)(sums[plane][side] + m * LANE),
                                     *(const i32x16 *)(sums[plane][side] + (x->height + m) * LANE));
            f32x16 *to = y + side * TOGETHER + m;
            *to = combine(kind, *to, parts[0], parts[1], g + side, x->scales[at + m], x->sums[at + m]);
        }
}

/* A panel for blocks [from, to) of rows. */
INLINE void run_panel(const kind_t kind, const product_t *p, long panel, long from, long to)
{
    const linear_t *c = &p->call;
    const integers_t *x = &p->x;
    const weights_t w = *c->packed;
    const long block_bytes = 2 * x->height * TILE_DEPTH, stride = x->blocks * block_bytes;
    const long rows = least(c->rows, to * x->height) - from * x->height;
    uint8_t room[2][PLANES][LANE_BYTES] __attribute__((aligned(64))), levels[2][16];
    int32_t sums[PLANES][2][SUMS] __attribute__((aligned(64)));
    f32x16 y[2 * TOGETHER] __attribute__((aligned(64)));
    if (kind == NF4)
        level_bytes((const float *)w.more + 1, levels);
    for (int side = 0; side < 2; side++)
        for (long m = 0; m < rows; m++)
            y[side * TOGETHER + m] = *(const f32x16 *)(c->bias + panel * PANEL + side * LANE);
    long chunk = from * x->height;
    for (long k = 0, deep; k < c->in; k += deep, chunk += x->blocks * x->height) {
        deep = chunk_depth(&w, x->depth, k);
        codes_t codes = codes_of(kind, &w, levels, panel, k, deep, room);
        long last = (w.out + LANE - 1) / LANE - 1;
        group_t g[2] = {group_of(kind, &w, 2 * panel, k / w.group),
                        group_of(kind, &w, least(2 * panel + 1, last), k / w.group)};
        const int8_t *tiles = x->tiles + k / TILE_DEPTH * stride + k % TILE_DEPTH;
        for (long block = from; block < to; block++) {
            for (int plane = 0; plane < (kind == NF4 ? PLANES : 1); plane++)
                add_products(&codes, plane, tiles + block * block_bytes, stride, (deep + TILE_DEPTH - 1) / TILE_DEPTH,
                             sums[plane][0]);
            long done = (block - from) * x->height;
            add_block(kind, x, (const int32_t(*)[2][SUMS])sums, chunk + done, least(x->height, rows - done), g, y + done);
        }
    }
    for (int side = 0; side < 2 && panel * PANEL + side * LANE < c->out; side++)
        for (long m = 0; m < rows; m++)
            finish_row(c, y[side * TOGETHER + m], from * x->height + m, 2 * panel + side);
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
    long deep = least(TILE_DEPTH, p->call.packed->group), height = 2 * x->height, blocks = TOGETHER / x->height;
    configure((long[8]){height, height, height, deep / 4, deep / 4, 0, 0, 0}, (long[8]){64, 64, deep, 64, 64, 0, 0, 0});
    for (long panel = part.from; panel < part.to; panel++)
        for (long block = 0; block < x->blocks; block += blocks)
            run_kind(p, panel, block, least(block + blocks, x->blocks));
    _tile_release();
}

void amx_run_integer(product_t *p, long threads) { crew_run(threads, count_parts(&p->call), run_chunk, p); }

#else

void amx_run_integer(product_t *p, long threads) { (void)p, (void)threads; }

#endif
