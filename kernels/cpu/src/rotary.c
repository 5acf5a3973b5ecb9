/* Rotary positions in place: x = x * cos + turned(x) * sin, where turned swaps the halves of a head and negates the
 * one that comes first. */
#include "thread_pool.h"

enum {
    BLOCK = 4,            /* rows of a chunk */
    TOO_SMALL = 64 * 1024 /* values below which waking a thread costs more than it saves */
};

typedef struct {
    float *x;
    const float *cos, *sin;
    long rows, heads, width, row; /* row: floats from one row of x to the next */
} rotary_t;

static void turn(float *x, const float *cos, const float *sin, long half)
{
    for (long i = 0; i < half; i++) {
        float left = x[i], right = x[half + i];
        x[i] = left * cos[i] - right * sin[i];
        x[half + i] = right * cos[half + i] + left * sin[half + i];
    }
}

static void run_chunk(void *job, long chunk)
{
    const rotary_t *r = job;
    long last = (chunk + 1) * BLOCK < r->rows ? (chunk + 1) * BLOCK : r->rows;
    for (long row = chunk * BLOCK; row < last; row++)
        for (long head = 0; head < r->heads; head++)
            turn(r->x + row * r->row + head * r->width, r->cos + row * r->width, r->sin + row * r->width,
                 r->width / 2);
}

void petal_rotate(float *x, const float *cos, const float *sin, long rows, long heads, long width, long row,
                  long threads)
{
    rotary_t r = {x, cos, sin, rows, heads, width, row};
    run_chunks(rows * heads * width < TOO_SMALL ? 1 : threads, (rows + BLOCK - 1) / BLOCK, run_chunk, &r);
}
