/* What the two halves of attention share: one call's arguments and the cache rows of one block of positions. */
#ifndef PETAL_ATTENTION_H
#define PETAL_ATTENTION_H

#include "tile.h"

#include <stdbool.h>

enum { BLOCK = PANEL }; /* positions packed side by side; blocks start at multiples of it */
enum { OK, BAD_PAGE, BAD_TREE, NO_MEMORY };

/* Mirrors _CALL of attention.py: 64-bit fields only. Distances are in elements. */
typedef struct {
    const char *q, *k, *v;
    char *out, *k_pages, *v_pages;
    const float *sinks;
    const int32_t *row_start, *row_count, *base, *positions, *parents, *page_table;
    const int32_t *stored; /* null: none */
    int64_t segments, max_pages, page_size, pages;
    int64_t q_heads, kv_heads, key_width, value_width;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    int64_t window; /* 0: none */
    int64_t half;       /* q, k, v and out are bfloat16 */
    int64_t half_pages; /* the pages are */
    int64_t threads;
    double scale, softcap; /* softcap 0: none */
} call_t;

/* One segment as its rows see it. */
typedef struct {
    const call_t *call;
    const int32_t *pages, *parents, *positions;
    long start, base, rows; /* row u stands at start + u in q, k, v and out */
    long stored;            /* its first rows, which are in the cache and ask nothing */
    bool chain; /* every row's parent is the row before: slot = position */
} segment_t;

/* How many rows one task should take: as many as share a block well, but not more than `wanted`. */
long rows_per_task(const segment_t *segment, long heads, long wanted);

/* The attention of `rows` rows from `row` on, for `heads` query heads that share one kv head. */
int attend_rows(const segment_t *segment, long row, long rows, long kv_head, long head, long heads);

/* exp(score - largest) in place over scores[from, to), multiplied by scale and softcapped first; entries around
 * them up to whole vectors become 0. Returns the sum, with sink's share. */
float softmax(float *scores, long from, long to, float scale, float softcap, const float *sink);

/* keys[depth][32] from 32 rows of width values, transposed; a null row gives zeros. */
void pack_keys(float *keys, const char *const *rows, long width, bool half);

/* values[32][padded] from 32 rows of width values; padding becomes zeros, null rows stay as they are. */
void pack_values(float *values, const char *const *rows, long width, long padded, bool half);

void load_row(float *to, const char *from, long width, bool half);
void store_row(char *to, const float *from, long width, bool half);

#endif
