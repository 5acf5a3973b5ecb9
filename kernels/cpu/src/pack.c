/* Moving rows of the cache into the shapes that tiles read, and the softmax between the two products. */
#include "attention.h"
#include "exp.h"

#include <math.h>

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

static f32x16 load16(const char *row, long at, bool half)
{
    return half ? load_half((const uint16_t *)row + at) : *(const f32x16 *)((const float *)row + at);
}

static float load1(const char *row, long at, bool half)
{
    return half ? half_to_float(((const uint16_t *)row)[at]) : ((const float *)row)[at];
}

void load_row(float *to, const char *from, long width, bool half)
{
    if (half)
        for (long i = 0; i < width; i++)
            to[i] = half_to_float(((const uint16_t *)from)[i]);
    else
        memcpy(to, from, (size_t)width * sizeof *to);
}

void store_row(char *to, const float *from, long width, bool half)
{
    if (half)
        for (long i = 0; i < width; i++)
            ((uint16_t *)to)[i] = float_to_half(from[i]);
    else
        memcpy(to, from, (size_t)width * sizeof *from);
}

/* Four rounds, each of which merges vector i with vector i + 8 lane by lane: a perfect shuffle of 256 values. */
static inline void transpose(f32x16 *v)
{
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
        f32x16 next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = SHUFFLE(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = SHUFFLE(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            v[i] = next[i];
    }
}

void pack_keys(float *keys, const char *const *rows, long width, bool half)
{
    for (long group = 0; group < BLOCK; group += LANES) {
        long d = 0;
        for (; d + LANES <= width; d += LANES) {
            f32x16 v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                v[i] = rows[group + i] ? load16(rows[group + i], d, half) : (f32x16){0};
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                *(f32x16 *)(keys + (d + i) * BLOCK + group) = v[i];
        }
        for (; d < width; d++)
            for (long i = 0; i < LANES; i++)
                keys[d * BLOCK + group + i] = rows[group + i] ? load1(rows[group + i], d, half) : 0;
    }
}

void pack_values(float *values, const char *const *rows, long width, long padded, bool half)
{
    for (long i = 0; i < BLOCK; i++, values += padded) {
        if (!rows[i])
            continue;
        long d = 0;
        for (; d + LANES <= width; d += LANES)
            *(f32x16 *)(values + d) = load16(rows[i], d, half);
        for (; d < width; d++)
            values[d] = load1(rows[i], d, half);
        for (; d < padded; d++)
            values[d] = 0;
    }
}

static f32x16 softcap16(f32x16 x, float cap)
{
    f32x16 z = x / cap;
    f32x16 size = (f32x16)((i32x16)z & 0x7fffffff);
    f32x16 e = exp16(size * -2.0f);
    f32x16 tanh = (1.0f - e) / (1.0f + e);
    return cap * (f32x16)((i32x16)tanh | ((i32x16)z & INT32_MIN));
}

float softmax(float *scores, long from, long to, float scale, float softcap, const float *sink)
{
    long first = from / LANES * LANES, last = (to + LANES - 1) / LANES * LANES;
    f32x16 *vectors = (f32x16 *)(scores + first);
    long count = (last - first) / LANES;
    for (long i = 0; i < count; i++) {
        f32x16 s = vectors[i] * scale;
        vectors[i] = softcap > 0 ? softcap16(s, softcap) : s;
    }
    for (long i = first; i < from; i++)
        scores[i] = -INFINITY;
    for (long i = to; i < last; i++)
        scores[i] = -INFINITY;
    f32x16 most = vectors[0];
    for (long i = 1; i < count; i++)
        most = select16(vectors[i] > most, vectors[i], most);
    float largest = sink ? *sink : -INFINITY;
    for (int i = 0; i < LANES; i++)
        largest = most[i] > largest ? most[i] : largest;
    f32x16 sums = {0};
    for (long i = 0; i < count; i++) {
        vectors[i] = exp16(vectors[i] - largest);
        sums += vectors[i];
    }
    float sum = sink ? exp16((f32x16){0} + (*sink - largest))[0] : 0;
    for (int i = 0; i < LANES; i++) /* lane = position modulo 16 */
        sum += sums[i];
    return sum;
}
