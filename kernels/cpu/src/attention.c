/* Attention of a ragged batch over paged keys and values.
 *
 * Row at position p sees exactly one key for every position in [low, p]: committed slots first, then its ancestors.
 * Scores, exponentials and outputs follow these positions in order, each element in one chain. Blocks of positions
 * are packed once and shared by as many rows as can see them; a row alone takes the same steps. Behind the last whole
 * block of a tree's committed slots, keys are packed by slot and each row picks the scores of its path. */
#include "attention.h"
#include "scratch.h"

enum {
    QUERIES = 96,        /* (row, head) pairs that share a packed block */
    SCORES = 256 * 1024, /* floats of scores that one task may keep, if it has more than one row */
};

/* One task: `rows` rows of a segment, `heads` query heads of one kv head. */
typedef struct {
    segment_t in;
    long row, rows;
    long kv_head, head, heads;
    long low, high, stride; /* positions [low, high) of all rows, low a multiple of BLOCK; floats in a score row */
    long padded;            /* value width in whole panels */
    float *block, *q, *out, *scores, *sums, *picks; /* picks: scores of a tree by slot */
    int32_t *path; /* pending row at each depth, for one row */
    int status;
} task_t;

static const float ZEROS[PANEL];

static long low_of(const task_t *t, long row)
{
    long window = t->in.call->window, low = t->in.positions[row] - window + 1;
    return window && low > 0 ? low : 0;
}

static long size_of(const call_t *c) { return c->half ? 2 : 4; }
static long stored_size(const call_t *c) { return c->half_pages ? 2 : 4; }

/* The cache rows of slots, in ascending runs of which pages are looked up once. */
typedef struct {
    const task_t *task;
    const char *pages, *next;
    long width, expected, left;
} finder_t;

static finder_t finder(const task_t *t, const char *pages, long width)
{
    return (finder_t){.task = t, .pages = pages, .width = width, .expected = -1};
}

/* Null where the slot has no page. */
static const char *find_slot(finder_t *f, long slot)
{
    const call_t *c = f->task->in.call;
    if (slot != f->expected || !f->left) { /* division only where a run of slots ends */
        long index = slot / c->page_size, offset = slot - index * c->page_size;
        long page = index < c->max_pages ? f->task->in.pages[index] : -1;
        if (page < 0 || page >= c->pages)
            return 0;
        f->next = f->pages + ((page * c->page_size + offset) * c->kv_heads + f->task->kv_head) * f->width * stored_size(c);
        f->left = c->page_size - offset;
    }
    const char *row = f->next;
    f->next += c->kv_heads * f->width * stored_size(c);
    f->expected = slot + 1;
    f->left--;
    return row;
}

/* The cache row at each slot of a block that begins at `begin`, null outside [from, to). */
static void find_rows(task_t *t, long begin, long from, long to, const char *pages, long width, const char **rows)
{
    finder_t f = finder(t, pages, width);
    for (long i = 0; i < BLOCK; i++) {
        bool seen = begin + i >= from && begin + i < to;
        rows[i] = seen ? find_slot(&f, begin + i) : 0;
        if (seen && !rows[i])
            t->status = BAD_PAGE;
    }
}

static void find_path(task_t *t, long row)
{
    const segment_t *s = &t->in;
    for (long u = row; u >= 0; u = s->parents[u])
        t->path[s->positions[u] - s->base] = (int32_t)u;
}

static void tiles(long rows, long depth, const float *x, long x_row, const float *w, long w_row, float *y, long y_row,
                  const float *start)
{
    for (long row = 0, count; row < rows; row += count) {
        count = tile_rows(rows - row);
        tile_float(count, depth, x + row * x_row, x_row, 1, w, w_row, y + row * y_row, y_row, start, (ahead_t){0});
    }
}

static void score_slots(task_t *t, long begin, long first, long last, long from, long to, float *scores, long stride)
{
    const call_t *c = t->in.call;
    const char *rows[BLOCK];
    find_rows(t, begin, from, to, c->k_pages, c->key_width, rows);
    pack_keys(t->block, rows, c->key_width, c->half_pages);
    long at = (first - t->row) * t->heads, count = (last - first) * t->heads;
    tiles(count, c->key_width, t->q + at * c->key_width, c->key_width, t->block, BLOCK, scores + at * stride, stride,
          ZEROS);
}

/* Scores of rows [first, last) at one block. Lanes that a row does not see are cleared by softmax. */
static void score_block(task_t *t, long block, long first, long last, long from, long to)
{
    score_slots(t, block * BLOCK, first, last, from, to, t->scores + block * BLOCK - t->low, t->stride);
}

/* Values [begin, begin + BLOCK) for rows [first, last): those that see all up to `end` together, others each for its
 * part. */
static void value_block(task_t *t, long block, long first, long last, long from, long to)
{
    const call_t *c = t->in.call;
    const char *rows[BLOCK];
    long begin = block * BLOCK, end = begin + BLOCK < to ? begin + BLOCK : to;
    find_rows(t, begin, from, to, c->v_pages, c->value_width, rows);
    pack_values(t->block, rows, c->value_width, t->padded, c->half_pages);
    for (long row = first, next; row < last; row = next) {
        long low = low_of(t, row), high = t->in.positions[row] + 1;
        long a = low > begin ? low : begin, b = high < end ? high : end;
        next = row + 1;
        if (a >= b)
            continue;
        if (a == begin && b == end)
            while (next < last && low_of(t, next) <= begin && t->in.positions[next] + 1 >= end)
                next++;
        long at = (row - t->row) * t->heads, count = (next - row) * t->heads;
        for (long d = 0; d < t->padded; d += PANEL)
            tiles(count, b - a, t->scores + at * t->stride + a - t->low, t->stride,
                  t->block + (a - begin) * t->padded + d, t->padded, t->out + at * t->padded + d, t->padded, 0);
    }
}

typedef void visit_t(task_t *, long block, long first, long last, long from, long to);

/* Blocks [first, last) that look the same to all rows, in order; positions from `high` on are not there yet. */
static void visit_blocks(task_t *t, long first, long last, long high, visit_t *visit)
{
    const segment_t *s = &t->in;
    for (long block = first; block < last; block++) {
        long from = high, end = t->row + t->rows, row = t->row;
        for (; row < end; row++)
            from = low_of(t, row) < from ? low_of(t, row) : from;
        /* rows of a chain that end before this block need not be visited */
        for (row = t->row; s->chain && row < end && s->positions[row] < block * BLOCK;)
            row++;
        visit(t, block, s->chain ? row : t->row, end, from, high);
    }
}

/* Scores of a tree's rows at the slots from the block of `base` on, each moved to its position. */
static void score_tree(task_t *t)
{
    const segment_t *s = &t->in;
    long begin = s->base / BLOCK * BLOCK, end = s->base + s->rows, slots = (end - begin + BLOCK - 1) / BLOCK * BLOCK;
    for (long at = begin; at < end; at += BLOCK)
        score_slots(t, at, t->row, t->row + t->rows, t->low, end, t->picks + at - begin, slots);
    for (long row = t->row; row < t->row + t->rows; row++) {
        find_path(t, row);
        for (long head = 0; head < t->heads; head++) {
            long i = (row - t->row) * t->heads + head;
            const float *from = t->picks + i * slots - begin;
            float *to = t->scores + i * t->stride - t->low;
            for (long p = begin > t->low ? begin : t->low; p <= s->positions[row]; p++)
                to[p] = from[p < s->base ? p : s->base + t->path[p - s->base]];
        }
    }
}

/* Values of the rows' paths, each path on its own. */
static void value_tree(task_t *t)
{
    const segment_t *s = &t->in;
    const call_t *c = s->call;
    for (long row = t->row; row < t->row + t->rows; row++) {
        long low = low_of(t, row), high = s->positions[row] + 1, count;
        find_path(t, row);
        for (long at = low > s->base ? low : s->base; at < high; at += count) {
            const char *rows[BLOCK] = {0};
            finder_t f = finder(t, c->v_pages, c->value_width);
            count = high - at < BLOCK ? high - at : BLOCK;
            for (long i = 0; i < count; i++)
                rows[i] = find_slot(&f, s->base + t->path[at + i - s->base]); /* its page was there for the keys */
            pack_values(t->block, rows, c->value_width, t->padded, c->half_pages);
            long first = (row - t->row) * t->heads;
            for (long d = 0; d < t->padded; d += PANEL)
                tiles(t->heads, count, t->scores + first * t->stride + at - t->low, t->stride, t->block + d, t->padded,
                      t->out + first * t->padded + d, t->padded, 0);
        }
    }
}

static void score_all(task_t *t)
{
    const segment_t *s = &t->in;
    long first = t->low / BLOCK, last = (t->high + BLOCK - 1) / BLOCK;
    visit_blocks(t, first, s->chain || last < s->base / BLOCK ? last : s->base / BLOCK, t->high, score_block);
    if (!s->chain)
        score_tree(t);
}

static void value_all(task_t *t)
{
    const segment_t *s = &t->in;
    long first = t->low / BLOCK, high = s->chain || t->high < s->base ? t->high : s->base;
    visit_blocks(t, first, (high + BLOCK - 1) / BLOCK, high, value_block);
    if (!s->chain)
        value_tree(t);
}

long rows_per_task(const segment_t *s, long heads, long wanted)
{
    long rows = QUERIES / heads, fit = SCORES / heads / (s->base + s->rows + BLOCK);
    rows = rows < fit ? rows : fit;
    rows = rows < wanted ? rows : wanted;
    return rows < 1 ? 1 : rows;
}

int attend_rows(const segment_t *in, long row, long rows, long kv_head, long head, long heads)
{
    task_t task = {.in = *in, .row = row, .rows = rows, .kv_head = kv_head, .head = head, .heads = heads}, *t = &task;
    const call_t *c = in->call;
    long queries = t->rows * t->heads, width = c->key_width;
    t->low = t->high = t->in.positions[t->row] + 1;
    for (long row = t->row; row < t->row + t->rows; row++) {
        t->low = low_of(t, row) < t->low ? low_of(t, row) : t->low;
        t->high = t->in.positions[row] + 1 > t->high ? t->in.positions[row] + 1 : t->high;
    }
    t->low = t->low / BLOCK * BLOCK;
    t->padded = (c->value_width + PANEL - 1) / PANEL * PANEL;
    t->stride = (t->high - t->low + BLOCK - 1) / BLOCK * BLOCK + LANES; /* odd in vectors: rows spread over the cache */
    long block = BLOCK * (width > t->padded ? width : t->padded);
    long picks = t->in.chain ? 0 : queries * (t->in.rows + 2 * BLOCK);
    long floats = block + queries * (width + t->padded + t->stride + 1) + picks + t->in.rows;
    t->block = scratch(TASK, floats * (long)sizeof(float));
    if (!t->block)
        return NO_MEMORY;
    t->out = t->block + block;
    t->scores = t->out + queries * t->padded;
    t->q = t->scores + queries * t->stride;
    t->sums = t->q + queries * width;
    t->picks = t->sums + queries;
    t->path = (int32_t *)(t->picks + picks);
    for (long i = 0; i < queries; i++) {
        long at = (t->in.start + t->row + i / t->heads) * c->q_row + (t->head + i % t->heads) * c->q_head;
        load_row(t->q + i * width, c->q + at * size_of(c), width, c->half);
    }
    score_all(t);
    if (t->status)
        return t->status;
    for (long i = 0; i < queries; i++) {
        long row = t->row + i / t->heads;
        const float *sink = c->sinks ? c->sinks + t->head + i % t->heads : 0;
        t->sums[i] = softmax(t->scores + i * t->stride, low_of(t, row) - t->low, t->in.positions[row] + 1 - t->low,
                             (float)c->scale, (float)c->softcap, sink);
    }
    memset(t->out, 0, (size_t)(queries * t->padded) * sizeof(float));
    value_all(t);
    for (long i = 0; i < queries; i++) {
        float *out = t->out + i * t->padded;
        for (long d = 0; d < c->value_width; d++)
            out[d] /= t->sums[i];
        long at = (t->in.start + t->row + i / t->heads) * c->q_heads + t->head + i % t->heads;
        store_row(c->out + at * c->value_width * size_of(c), out, c->value_width, c->half);
    }
    return OK;
}
