/* The largest values of each row and their columns, largest first, the lower column first among equals. */
#include "crew.h"

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

static int descending(const void *left, const void *right)
{
    const entry_t *a = left, *b = right;
    if (a->value != b->value)
        return a->value < b->value ? 1 : -1;
    return a->column < b->column ? -1 : 1;
}

/* Collects what exceeds the smallest value that may still count; sorts and cuts whenever the room is used up. */
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
            qsort(found, (size_t)size, sizeof *found, descending);
            size = t->count;
            floor = found[size - 1].value;
        }
    }
    qsort(found, (size_t)size, sizeof *found, descending);
    for (long i = 0; i < t->count; i++) {
        t->values[row * t->count + i] = found[i].value;
        t->columns[row * t->count + i] = found[i].column;
    }
}

void petal_topk(float *values, int64_t *columns, const float *x, long rows, long width, long count, long threads)
{
    topk_t t = {values, columns, x, width, count};
    crew_run(threads, rows, run_row, &t);
}
