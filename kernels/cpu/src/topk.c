/* The largest values of each row and their columns, largest first, the lower column first among equals. */
#include "thread_pool.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum {
    RUN = 64,  /* values looked at together */
    MOST = 256 /* values wanted at most */
};

typedef struct {
    float value;
    int32_t column;
} entry_t;

typedef struct {
    float *values;
    int64_t *columns;
    const float *x;
    long width, count;
} topk_t;

static inline bool before(entry_t a, entry_t b) { return a.value > b.value || (a.value == b.value && a.column < b.column); }

static int order(const void *left, const void *right)
{
    const entry_t *a = left, *b = right;
    return before(*b, *a) - before(*a, *b);
}

/* Moves the first `count` of `size` entries to the front, in any order (Hoare's selection). */
static void select_first(entry_t *e, long size, long count)
{
    for (long low = 0, high = size - 1; low < high;) {
        entry_t pivot = e[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (before(e[i], pivot))
                i++;
            while (before(pivot, e[j]))
                j--;
            if (i <= j) {
                entry_t swap = e[i];
                e[i++] = e[j];
                e[j--] = swap;
            }
        }
        if (count - 1 <= j)
            high = j;
        else if (count - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Collects what exceeds the smallest value that may still count; cuts whenever the room is used up. */
static void run_row(void *job, long row)
{
    const topk_t *t = job;
    const float *x = t->x + row * t->width;
    entry_t found[4 * MOST + RUN];
    long size = 0, room = 4 * t->count;
    float floor = -__builtin_inff();
    for (long start = 0; start < t->width; start += RUN) {
        long end = start + RUN < t->width ? start + RUN : t->width;
        float peak = x[start];
        for (long i = start; i < end; i++)
            peak = x[i] > peak ? x[i] : peak;
        if (!(peak > floor) && size >= t->count)
            continue;
        for (long i = start; i < end; i++)
            if (x[i] > floor || size < t->count)
                found[size++] = (entry_t){x[i], (int32_t)i};
        if (size >= room) {
            select_first(found, size, t->count);
            size = t->count;
            floor = found[0].value;
            for (long i = 1; i < size; i++)
                floor = found[i].value < floor ? found[i].value : floor;
        }
    }
    select_first(found, size, t->count);
    qsort(found, (size_t)t->count, sizeof *found, order);
    for (long i = 0; i < t->count; i++) {
        t->values[row * t->count + i] = found[i].value;
        t->columns[row * t->count + i] = found[i].column;
    }
}

void petal_topk(float *values, int64_t *columns, const float *x, long rows, long width, long count, long threads)
{
    topk_t t = {values, columns, x, width, count};
    run_chunks(threads, rows, run_row, &t);
}
