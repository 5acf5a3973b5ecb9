/* The ragged batch around attention: checks, storing new rows, sharing tasks among threads, compaction. */
#include "attention.h"
#include "scratch.h"
#include "thread_pool.h"

enum {
    HEADS = 16,             /* query heads of one task */
    TOO_SMALL = 256 * 1024, /* multiply-adds below which waking a thread costs more than it saves */
};

/* `passed`: stored rows of this segment and those before it, which have no place in q. */
static segment_t open_segment(const call_t *c, long index, long passed)
{
    long start = c->row_start[index];
    segment_t s = {.call = c,
                   .pages = c->page_table + index * c->max_pages,
                   .parents = c->parents + start,
                   .positions = c->positions + start,
                   .start = start - passed,
                   .base = c->base[index],
                   .rows = c->row_count[index],
                   .stored = c->stored ? c->stored[index] : 0,
                   .chain = true};
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

static void store(char *to, const char *from, long width, const call_t *c)
{
    if (c->half == c->half_pages)
        memcpy(to, from, (size_t)(width * (c->half ? 2 : 4)));
    else if (c->half_pages)
        store_row(to, (const float *)from, width, true);
    else
        load_row((float *)to, from, width, true);
}

/* Copies a segment's new rows into their slots. */
static int write_rows(const segment_t *s)
{
    const call_t *c = s->call;
    long size = c->half ? 2 : 4, stored = c->half_pages ? 2 : 4;
    long k_bytes = c->key_width * stored, v_bytes = c->value_width * stored;
    for (long u = s->stored; u < s->rows; u++) {
        long slot = s->base + u, index = slot / c->page_size, row = s->start + u;
        long page = index < c->max_pages ? s->pages[index] : -1;
        if (page < 0 || page >= c->pages)
            return BAD_PAGE;
        long at = (page * c->page_size + slot % c->page_size) * c->kv_heads;
        for (long h = 0; h < c->kv_heads; h++) {
            store(c->k_pages + (at + h) * k_bytes, c->k + (row * c->k_row + h * c->k_head) * size, c->key_width, c);
            store(c->v_pages + (at + h) * v_bytes, c->v + (row * c->v_row + h * c->v_head) * size, c->value_width, c);
        }
    }
    return OK;
}

/* How attention is cut into tasks: never visible in the results. Tasks are numbered through all segments. */
typedef struct {
    const call_t *call;
    const segment_t *segments;
    const long *first;         /* task of each segment */
    long group, heads, parts;  /* query heads of a kv head, of a task; tasks of a kv head for the same rows */
    long wanted;               /* rows of a task that give every thread some */
    int status;
} cut_t;

static long tasks_of(const segment_t *s, const cut_t *cut)
{
    long rows = rows_per_task(s, cut->heads, cut->wanted);
    return (s->rows - s->stored + rows - 1) / rows * cut->call->kv_heads * cut->parts;
}

static const segment_t *segment_of(const cut_t *cut, long *task)
{
    long low = 0, high = cut->call->segments - 1;
    while (low < high) {
        long middle = (low + high + 1) / 2;
        if (cut->first[middle] <= *task)
            low = middle;
        else
            high = middle - 1;
    }
    *task -= cut->first[low];
    return cut->segments + low;
}

static void run_task(void *job, long task)
{
    cut_t *cut = job;
    const segment_t *s = segment_of(cut, &task);
    long rows = rows_per_task(s, cut->heads, cut->wanted), columns = cut->call->kv_heads * cut->parts;
    long row = s->stored + task / columns * rows, kv_head = task % columns / cut->parts, head = task % cut->parts * cut->heads;
    long left = cut->group - head;
    int status = attend_rows(s, row, rows < s->rows - row ? rows : s->rows - row, kv_head,
                             kv_head * cut->group + head, left < cut->heads ? left : cut->heads);
    if (status)
        __atomic_store_n(&cut->status, status, __ATOMIC_RELAXED);
}

static int attend_all(const call_t *c, const segment_t *segments, long *first)
{
    cut_t cut = {.call = c, .segments = segments, .first = first, .group = c->q_heads / c->kv_heads};
    cut.heads = cut.group < HEADS ? cut.group : HEADS;
    cut.parts = (cut.group + cut.heads - 1) / cut.heads;
    long work = 0, rows = 0, tasks = 0;
    for (const segment_t *s = segments; s < segments + c->segments; s++) {
        long asking = s->rows - s->stored;
        rows += asking;
        work += asking * (s->base + s->rows) * c->q_heads * (c->key_width + c->value_width);
    }
    cut.wanted = rows * c->kv_heads * cut.parts / (4 * c->threads) + 1;
    for (long i = 0; i < c->segments; i++) {
        first[i] = tasks;
        tasks += tasks_of(segments + i, &cut);
    }
    run_chunks(work < TOO_SMALL ? 1 : c->threads, tasks, run_task, &cut);
    return cut.status;
}

/* Stores rows, then attends. Returns OK, BAD_PAGE, BAD_TREE or NO_MEMORY. */
int petal_attention(const call_t *c)
{
    segment_t *segments = scratch(SEGMENTS, c->segments * (long)(sizeof *segments + sizeof(long)));
    long *first = (long *)(segments + c->segments);
    int status = segments ? OK : NO_MEMORY;
    for (long i = 0, passed = 0; i < c->segments && !status; i++) {
        passed += c->stored ? c->stored[i] : 0;
        segments[i] = open_segment(c, i, passed);
        if (!is_tree(segments + i))
            status = BAD_TREE;
    }
    for (long i = 0; i < c->segments && !status; i++)
        status = write_rows(segments + i);
    if (!status)
        status = attend_all(c, segments, first);
    return status;
}

/* In each pool of rows, moves row from[i] to to[i], all read before any is written; nonzero where memory lacks. */
int petal_move_rows(char *const *pools, const int64_t *row_bytes, long count, const int64_t *from, const int64_t *to,
                    long rows)
{
    for (long p = 0; p < count; p++) {
        size_t bytes = (size_t)row_bytes[p];
        char *room = scratch(ROWS, rows * row_bytes[p]);
        if (!room)
            return 1;
        for (long i = 0; i < rows; i++)
            memcpy(room + (size_t)i * bytes, pools[p] + (size_t)from[i] * bytes, bytes);
        for (long i = 0; i < rows; i++)
            memcpy(pools[p] + (size_t)to[i] * bytes, room + (size_t)i * bytes, bytes);
    }
    return 0;
}
