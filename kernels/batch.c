/* The ragged batch around attention: checks, storing new rows, sharing tasks among threads, compaction. */
#include "attention.h"

#include <omp.h>

enum {
    HEADS = 16,             /* query heads of one task */
    TOO_SMALL = 256 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
};

static segment_t open_segment(const call_t *c, long index)
{
    long start = c->row_start[index];
    segment_t s = {c, c->page_table + index * c->max_pages, c->parents + start, c->positions + start, start,
                   c->base[index], c->row_count[index], true};
    for (long u = 0; u < s.rows; u++)
        s.chain &= s.parents[u] == u - 1;
    return s;
}

static bool is_tree(const segment_t *s)
{
    for (long u = 0; u < s->rows; u++) {
        long parent = s->parents[u];
        if (parent < -1 || parent >= u || s->positions[u] != (parent < 0 ? s->base : s->positions[parent] + 1))
            return false;
    }
    return true;
}

/* Copies this thread's share of a segment's new rows into their slots. */
static int write_rows(const segment_t *s, long me, long of)
{
    const call_t *c = s->call;
    long size = c->half ? 2 : 4, k_bytes = c->key_width * size, v_bytes = c->value_width * size;
    for (long u = s->rows * me / of; u < s->rows * (me + 1) / of; u++) {
        long slot = s->base + u, index = slot / c->page_size, row = s->start + u;
        long page = index < c->max_pages ? s->pages[index] : -1;
        if (page < 0 || page >= c->pages)
            return BAD_PAGE;
        long at = (page * c->page_size + slot % c->page_size) * c->kv_heads;
        for (long h = 0; h < c->kv_heads; h++) {
            memcpy(c->k_pages + (at + h) * k_bytes, c->k + (row * c->k_row + h * c->k_head) * size, (size_t)k_bytes);
            memcpy(c->v_pages + (at + h) * v_bytes, c->v + (row * c->v_row + h * c->v_head) * size, (size_t)v_bytes);
        }
    }
    return OK;
}

/* How attention is cut into tasks: never visible in the results. */
typedef struct {
    long group, heads, parts; /* query heads of a kv head, of a task; tasks of a kv head for the same rows */
    long wanted;              /* rows of a task that give every thread some */
} cut_t;

static long tasks_of(const call_t *c, const segment_t *s, const cut_t *cut)
{
    long rows = rows_per_task(s, cut->heads, cut->wanted);
    return (s->rows + rows - 1) / rows * c->kv_heads * cut->parts;
}

static int run_task(const call_t *c, const segment_t *s, const cut_t *cut, long task)
{
    long rows = rows_per_task(s, cut->heads, cut->wanted), columns = c->kv_heads * cut->parts;
    long row = task / columns * rows, kv_head = task % columns / cut->parts, head = task % cut->parts * cut->heads;
    long left = cut->group - head;
    return attend_rows(s, row, rows < s->rows - row ? rows : s->rows - row, kv_head, kv_head * cut->group + head,
                       left < cut->heads ? left : cut->heads);
}

/* Stores rows if `write`, then attends if `attend`. Returns OK, BAD_PAGE or BAD_TREE. */
int petal_attention(const call_t *c)
{
    cut_t cut = {.group = c->q_heads / c->kv_heads};
    cut.heads = cut.group < HEADS ? cut.group : HEADS;
    cut.parts = (cut.group + cut.heads - 1) / cut.heads;
    long work = 0, rows = 0, threads = c->threads, next = 0;
    for (long i = 0; i < c->segments; i++) {
        segment_t s = open_segment(c, i);
        if (!is_tree(&s))
            return BAD_TREE;
        rows += s.rows;
        work += s.rows * (s.base + s.rows) * c->q_heads * (c->key_width + c->value_width);
    }
    if (work < TOO_SMALL)
        threads = 1;
    cut.wanted = rows * c->kv_heads * cut.parts / (4 * threads) + 1;
    int status = OK;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        int failed = OK;
        for (long i = 0; c->write && i < c->segments; i++) {
            segment_t s = open_segment(c, i);
            int result = write_rows(&s, omp_get_thread_num(), omp_get_num_threads());
            failed = failed ? failed : result;
        }
#pragma omp barrier
        /* tasks are numbered through all segments; a thread's numbers only rise */
        long before = 0, task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        for (long i = 0; c->attend && i < c->segments; i++) {
            segment_t s = open_segment(c, i);
            long count = tasks_of(c, &s, &cut);
            for (; task < before + count; task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) {
                int result = run_task(c, &s, &cut, task - before);
                failed = failed ? failed : result;
            }
            before += count;
        }
        if (failed)
            __atomic_store_n(&status, failed, __ATOMIC_RELAXED);
    }
    return status;
}

/* In each pool of rows, moves slot from[i] to slot to[i] <= from[i], in increasing order. */
void petal_move_rows(char *const *pools, const int64_t *row_bytes, int64_t count, const int32_t *pages,
                     int64_t page_size, const int32_t *from, const int32_t *to, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) {
        int64_t a = (int64_t)pages[from[i] / page_size] * page_size + from[i] % page_size;
        int64_t b = (int64_t)pages[to[i] / page_size] * page_size + to[i] % page_size;
        for (int64_t p = 0; p < count && a != b; p++)
            memcpy(pools[p] + b * row_bytes[p], pools[p] + a * row_bytes[p], (size_t)row_bytes[p]);
    }
}
