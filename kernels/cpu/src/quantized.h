/* Weights in a packed format, and how products read them: a few rows at a time, as bfloat16. */
#ifndef PETAL_QUANTIZED_H
#define PETAL_QUANTIZED_H

#include "tile.h"

/* In the order of KINDS in quantized.py. */
typedef enum {
    FP16, INT8, INT4, NF4, AQLM, SPQR, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, Q5_0, Q5_1, Q2_K, Q3_K, IQ4_NL, IQ4_XS
} kind_t;

/* Rows of codes follow each other, row_bytes apart; what else a format has is said beside its decoder. */
typedef struct {
    int64_t kind, out, in, row_bytes, group, count;
    const uint8_t *codes;
    const void *scales, *zeros, *extra, *more;
} weights_t;

enum {
    RUN = 32,           /* neighbours of a row that stay together */
    STEP = RUN * PANEL, /* values of so much depth of a panel */
    PIECE = 256         /* depth that is decoded at once */
};

/* Decodes depths [k, k + count) of rows [first, first + rows), at most PANEL, rounded to nearest even, to
 * [step][PANEL][RUN]; the last step is padded with zeros or with what meets zeros of x. k is a multiple of PIECE, count
 * at most PIECE. */
void decode(const weights_t *w, long first, long rows, long k, long count, uint16_t *to);

/* A piece of a panel, what is next being fetched meanwhile; returns the number of steps. */
long decode_panel(const weights_t *w, long panel, long k, uint16_t *to);

/* `decode` for formats that have a faster way on this processor; 0, with nothing done, where there is none. Row by row
 * `lines` cache lines from `next` on, which moves with the rows, are fetched. */
int decode_wide(const weights_t *w, long first, long rows, long k, long count, uint16_t *to, const uint8_t *next,
                long lines);

static inline float fp16_to_float(uint16_t h)
{
#ifdef __FLT16_MAX__
    _Float16 f;
    memcpy(&f, &h, sizeof f);
    return (float)f;
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7fff) << 13;
    float scaled, magic = 0x1p112f; /* moves the exponent's bias, for subnormal numbers too */
    memcpy(&scaled, &bits, sizeof scaled);
    scaled *= magic;
    memcpy(&bits, &scaled, sizeof bits);
    bits |= sign;
    memcpy(&scaled, &bits, sizeof scaled);
    return scaled;
#endif
}

static inline float fp16_at(const void *p)
{
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return fp16_to_float(h);
}

#endif
