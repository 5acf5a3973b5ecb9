/* y = silu(gate) * up, the activation of gated MLPs, row by row in float32. */
#include "thread_pool.h"
#include "exp.h"

enum {
    CHUNK = 4096,         /* values */
    TOO_SMALL = 32 * 1024 /* values below which waking a thread costs more than it saves */
};

typedef struct {
    float *y;
    const float *gate, *up;
    long count;
} gate_t;

/* x * sigmoid(x), by the exponential that cannot overflow. */
static f32x16 silu16(f32x16 x)
{
    i32x16 negative = x < 0;
    f32x16 e = exp16((f32x16)((i32x16)x | INT32_MIN));
    return x * select16(negative, e, (f32x16){0} + 1.0f) / (1.0f + e);
}

static void run_chunk(void *job, long chunk)
{
    const gate_t *g = job;
    long i = chunk * CHUNK, last = i + CHUNK < g->count ? i + CHUNK : g->count;
    for (; i + LANES <= last; i += LANES)
        *(f32x16 *)(g->y + i) = silu16(*(const f32x16 *)(g->gate + i)) * *(const f32x16 *)(g->up + i);
    if (i < last) {
        size_t bytes = (size_t)(last - i) * sizeof(float);
        f32x16 gate = {0}, up = {0};
        memcpy(&gate, g->gate + i, bytes);
        memcpy(&up, g->up + i, bytes);
        f32x16 y = silu16(gate) * up;
        memcpy(g->y + i, &y, bytes);
    }
}

void petal_silu_gate(float *y, const float *gate, const float *up, long count, long threads)
{
    gate_t g = {y, gate, up, count};
    run_chunks(count < TOO_SMALL ? 1 : threads, (count + CHUNK - 1) / CHUNK, run_chunk, &g);
}
