/* y = weight * x / sqrt(mean(x * x) + epsilon), row by row, in float32. */
#include "thread_pool.h"
#include "tile.h"

#include <math.h>

enum {
    BLOCK = 16,           /* rows of a chunk */
    TOO_SMALL = 64 * 1024 /* values below which waking a thread costs more than it saves */
};

typedef struct {
    float *y;
    const float *x, *weight;
    long rows, width;
    float epsilon;
} norm_t;

static void norm_row(float *y, const float *x, const float *weight, long width, float epsilon)
{
    f32x16 squares = {0};
    long whole = width / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        f32x16 v = *(const f32x16 *)(x + i);
        squares += v * v;
    }
    for (long i = whole; i < width; i++)
        squares[i - whole] += x[i] * x[i];
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) /* always in this order */
        sum += squares[lane];
    float scale = 1 / sqrtf(sum / (float)width + epsilon);
    for (long i = 0; i < width; i++)
        y[i] = weight[i] * (x[i] * scale);
}

static void run_chunk(void *job, long chunk)
{
    const norm_t *n = job;
    long last = (chunk + 1) * BLOCK < n->rows ? (chunk + 1) * BLOCK : n->rows;
    for (long row = chunk * BLOCK; row < last; row++)
        norm_row(n->y + row * n->width, n->x + row * n->width, n->weight, n->width, n->epsilon);
}

void petal_rms_norm(float *y, const float *x, const float *weight, long width, double epsilon, long rows, long threads)
{
    norm_t n = {y, x, weight, rows, width, (float)epsilon};
    run_chunks(rows * width < TOO_SMALL ? 1 : threads, (rows + BLOCK - 1) / BLOCK, run_chunk, &n);
}
