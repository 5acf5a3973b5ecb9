/* One product y[rows][out] = x[rows][in] * w^T + bias, as the two ways to compute it see it. */
#ifndef PETAL_LINEAR_H
#define PETAL_LINEAR_H

#include "quantized.h"
#include "tile.h"

#include <stdbool.h>

enum { DEPTH_UNIT = 32 }; /* bfloat16 panels have a multiple of this depth: a row of a register of the matrix unit */

/* A panel is 32 columns of w^T side by side. float32: panels[ceil(out / 32)][depth][32] with depth = in. bfloat16: pairs
 * of depth are neighbours, panels[ceil(out / 32)][depth / 2][32][2], zero from `in` on. */
typedef struct {
    float *y;
    const float *x;
    const char *panels;
    const weights_t *packed; /* in place of panels: they are decoded when they are needed */
    const float *bias; /* padded to whole panels */
    long rows, in, out, depth;
    bool half;         /* bfloat16 panels; x is rounded to bfloat16 too, sums stay float32 */
    long wide, height; /* panels and rows of a chunk */
    bool failed;       /* for want of memory */
    void *tiles;       /* x again, in the order in which tiles read it; null where they read x itself */
} linear_t;

/* One chunk: panels [from, to) for rows [first, last). */
typedef struct {
    long from, to, first, last;
} part_t;

static inline long count_parts(const linear_t *c)
{
    long panels = (c->out + PANEL - 1) / PANEL;
    return (panels + c->wide - 1) / c->wide * ((c->rows + c->height - 1) / c->height);
}

static inline part_t part_of(const linear_t *c, long chunk)
{
    long panels = (c->out + PANEL - 1) / PANEL, across = (panels + c->wide - 1) / c->wide;
    part_t part = {.from = chunk % across * c->wide, .first = chunk / across * c->height};
    part.to = part.from + c->wide < panels ? part.from + c->wide : panels;
    part.last = part.first + c->height < c->rows ? part.first + c->height : c->rows;
    return part;
}

/* A product by tiles of tile.h. Nonzero, with y unfinished, where memory lacks. */
int run_tiles(linear_t *c, long threads);

/* Whether this process may use the matrix unit of the processor (Intel AMX). */
bool amx_ready(void);
/* A product with bfloat16 panels on it; c->tiles has room for rows * depth values. Every sum has the order of the
 * matrix unit, which is another than that of tile.h. */
void amx_run(linear_t *c, long threads);
/* The same with packed weights; c->tiles has room for rows * depth values too. Bits are those of amx_run. Nonzero, with
 * y unfinished, where memory lacks. */
int amx_run_packed(linear_t *c, long threads);

#endif
