/* From packed weights to bfloat16, format by format, for any processor. */
#include "quantized.h"

static long least(long a, long b) { return a < b ? a : b; }

/* scales: none. */
static void decode_fp16(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *from = w->codes + row * w->row_bytes + 2 * k;
    for (long i = 0; i < count; i++)
        to[i] = fp16_at(from + 2 * i);
}

/* Where blocks go on from row to row: codes in the checkpoint's order, even places high. more: the offset of scales and the 16 levels. Without zeros scales are float by block of 64, else uint8; then zeros:
 * float by 256 blocks; extra: float[256], what the scales mean. */
static void decode_nf4(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *scales = w->scales;
    const float *nested = w->zeros, *map = w->extra, *offset = w->more, *levels = offset + 1;
    for (long i = 0; i < count; i++) {
        long place = row * w->in + k + i, block = place / 64;
        float scale = nested ? map[scales[block]] * nested[block / 256] + *offset : ((const float *)scales)[block];
        to[i] = levels[w->codes[place / 2] >> (place % 2 ? 0 : 4) & 15] * scale;
    }
}

/* scales: float16 a row; extra: float16 codebooks of 1 << group vectors of 8, `count` of them. Codes are bytes for up
 * to 8 bits, else 16-bit words. */
static void decode_aqlm(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    long books = w->count, wide = w->group > 8;
    float scale = fp16_to_float(((const uint16_t *)w->scales)[row]);
    for (long i = 0; i < count; i += 8) {
        float sum[8] = {0};
        for (long c = 0; c < books; c++) {
            long at = (k + i) / 8 * books + c;
            long code = wide ? codes[2 * at] | codes[2 * at + 1] << 8 : codes[at];
            const uint16_t *vector = (const uint16_t *)w->extra + ((c << w->group) + code) * 8;
            for (int j = 0; j < 8; j++)
                sum[j] += fp16_to_float(vector[j]);
        }
        for (int j = 0; j < 8; j++)
            to[i + j] = sum[j] * scale;
    }
}

static uint64_t word_at(const weights_t *w, long row, long tile)
{
    uint64_t word;
    memcpy(&word, w->codes + row * w->row_bytes + tile * 8, sizeof word);
    return word;
}

/* scales: int32 offsets of the rows' outliers; zeros: uint32 outliers, float16 high, column low; extra: float16 numbers
 * of the tiles, four each. */
static void decode_spqr(const weights_t *w, long row, long k, long count, float *to)
{
    float room[16];
    for (long i = 0; i < count; i += 16) {
        long tile = (k + i) / 16;
        uint64_t word = word_at(w, row, tile);
        const uint16_t *n = (const uint16_t *)w->extra + (row / 16 * (w->row_bytes / 8) + tile) * 4;
        float scale = fp16_to_float(n[0]) * ((float)(word & 7) - fp16_to_float(n[2]));
        float zero = fp16_to_float(n[1]) * ((float)(word >> 3 & 7) - fp16_to_float(n[3]));
        for (int j = 0; j < 16; j++)
            room[j] = scale * ((float)((uint32_t)(word >> (j < 8 ? 6 : 30)) >> 3 * (j % 8) & 7) - zero);
        memcpy(to + i, room, (size_t)least(16, count - i) * sizeof *to);
    }
    const int32_t *offsets = w->scales;
    const uint32_t *outliers = w->zeros;
    for (long i = offsets[row]; i < offsets[row + 1]; i++) {
        long column = outliers[i] & 0xffff;
        if (column >= k && column < k + count)
            to[column - k] += fp16_to_float((uint16_t)(outliers[i] >> 16));
    }
}

/* Blocks of 256, here always whole: eight groups of 32 with 6-bit scale and minimum in 12 bytes. */

static void k_scale(const uint8_t *block, int group, float *scale, float *low)
{
    const uint8_t *p = block + 4;
    int a = group % 4, s = p[a] & 63, m = p[4 + a] & 63;
    if (group >= 4) {
        s = (p[8 + a] & 15) | (p[a] >> 6 << 4);
        m = p[8 + a] >> 4 | (p[4 + a] >> 6 << 4);
    }
    *scale = fp16_at(block) * (float)s;
    *low = fp16_at(block + 2) * (float)m;
}

static void decode_q4_k(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 144;
    (void)count;
    for (int group = 0; group < 8; group++) {
        const uint8_t *codes = block + 16 + group / 2 * 32;
        int shift = group % 2 * 4;
        float scale, low;
        k_scale(block, group, &scale, &low);
        for (int j = 0; j < 32; j++)
            to[group * 32 + j] = (float)(codes[j] >> shift & 15) * scale - low;
    }
}

static void decode_q5_k(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 176, *fifth = block + 16;
    (void)count;
    for (int group = 0; group < 8; group++) {
        const uint8_t *codes = block + 48 + group / 2 * 32;
        int shift = group % 2 * 4;
        float scale, low;
        k_scale(block, group, &scale, &low);
        for (int j = 0; j < 32; j++)
            to[group * 32 + j] = (float)((codes[j] >> shift & 15) + (fifth[j] >> group & 1) * 16) * scale - low;
    }
}

static void decode_q6_k(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 210;
    const int8_t *scales = (const int8_t *)block + 192;
    float whole = fp16_at(block + 208);
    (void)count;
    for (int group = 0; group < 8; group++) {
        const uint8_t *codes = block + group / 4 * 64 + group % 2 * 32, *high = block + 128 + group / 4 * 32;
        int shift = group / 2 % 2 * 4, place = group % 4 * 2;
        for (int half = 0; half < 2; half++) {
            float scale = whole * (float)scales[2 * group + half];
            for (int j = half * 16; j < half * 16 + 16; j++)
                to[group * 32 + j] = (float)((codes[j] >> shift & 15) + (high[j] >> place & 3) * 16 - 32) * scale;
        }
    }
}

static void decode_q2_k(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 84;
    float whole = fp16_at(block + 80), lowest = fp16_at(block + 82);
    (void)count;
    for (int group = 0; group < 16; group++) {
        const uint8_t *codes = block + 16 + group / 8 * 32 + group % 2 * 16;
        int shift = group / 2 % 4 * 2;
        float scale = whole * (float)(block[group] & 15), low = lowest * (float)(block[group] >> 4);
        for (int j = 0; j < 16; j++)
            to[group * 16 + j] = (float)(codes[j] >> shift & 3) * scale - low;
    }
}

/* The third bits come first, then two bits a code, then 6-bit scales. */
static void decode_q3_k(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 110, *scales = block + 96;
    float whole = fp16_at(block + 108);
    (void)count;
    for (int group = 0; group < 16; group++) {
        const uint8_t *codes = block + 32 + group / 8 * 32 + group % 2 * 16, *third = block + group % 2 * 16;
        int shift = group / 2 % 4 * 2, place = group / 2;
        int six = (scales[group % 8] >> group / 8 * 4 & 15) | (scales[8 + group % 4] >> group / 4 * 2 & 3) << 4;
        float scale = whole * (float)(six - 32);
        for (int j = 0; j < 16; j++)
            to[group * 16 + j] = (float)((codes[j] >> shift & 3) + (third[j] >> place & 1) * 4 - 4) * scale;
    }
}

static const float iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static void decode_iq4_xs(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 256 * 136, *codes = block + 8;
    float whole = fp16_at(block);
    (void)count;
    for (int group = 0; group < 8; group++, codes += 16) {
        int six = (block[4 + group / 2] >> group % 2 * 4 & 15) | (block[2 + group / 4] >> group % 4 * 2 & 3) << 4;
        float scale = whole * (float)(six - 32);
        for (int j = 0; j < 16; j++) {
            to[group * 32 + j] = iq4[codes[j] & 15] * scale;
            to[group * 32 + 16 + j] = iq4[codes[j] >> 4] * scale;
        }
    }
}

/* Blocks of 32: low halves of the bytes, then the high ones. */

static void decode_iq4_nl(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 32 * 18;
    for (long i = 0; i < count; i += 32, block += 18) {
        float scale = fp16_at(block);
        for (int j = 0; j < 16; j++) {
            to[i + j] = iq4[block[2 + j] & 15] * scale;
            to[i + 16 + j] = iq4[block[2 + j] >> 4] * scale;
        }
    }
}

/* Codes of five bits: bits four of all 32 in four bytes, then the others. */
static void five_bits(const uint8_t *block, float *to)
{
    uint32_t fifth;
    memcpy(&fifth, block, sizeof fifth);
    for (int j = 0; j < 16; j++) {
        to[j] = (float)((block[4 + j] & 15) + (fifth >> j & 1) * 16);
        to[16 + j] = (float)((block[4 + j] >> 4) + (fifth >> (16 + j) & 1) * 16);
    }
}

static void decode_q5_0(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 32 * 22;
    for (long i = 0; i < count; i += 32, block += 22) {
        float scale = fp16_at(block);
        five_bits(block + 2, to + i);
        for (int j = 0; j < 32; j++)
            to[i + j] = (to[i + j] - 16) * scale;
    }
}

static void decode_q5_1(const weights_t *w, long row, long k, long count, float *to)
{
    const uint8_t *block = w->codes + row * w->row_bytes + k / 32 * 24;
    for (long i = 0; i < count; i += 32, block += 24) {
        float scale = fp16_at(block), low = fp16_at(block + 2);
        five_bits(block + 4, to + i);
        for (int j = 0; j < 32; j++)
            to[i + j] = to[i + j] * scale + low;
    }
}

static void (*const decoders[])(const weights_t *, long, long, long, float *) = {
    [FP16] = decode_fp16, [NF4] = decode_nf4, [AQLM] = decode_aqlm, [SPQR] = decode_spqr,
    [Q4_K] = decode_q4_k, [Q5_K] = decode_q5_k, [Q6_K] = decode_q6_k, [Q5_0] = decode_q5_0, [Q5_1] = decode_q5_1,
    [Q2_K] = decode_q2_k, [Q3_K] = decode_q3_k, [IQ4_NL] = decode_iq4_nl, [IQ4_XS] = decode_iq4_xs,
};

/* float_to_half of sixteen, of which none is NaN. */
static u16x16 to_half(u32x16 bits)
{
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, u16x16);
}

void decode(const weights_t *w, long first, long rows, long k, long count, uint16_t *to)
{
    float values[PIECE];
    long padded = (count + RUN - 1) / RUN * RUN;
    for (long row = first; row < first + rows; row++, to += RUN) {
        decoders[w->kind](w, row, k, count, values);
        for (long i = count; i < padded; i++)
            values[i] = 0;
        for (long i = 0; i < padded; i += LANES)
            *(u16x16 *)(to + i / RUN * STEP + i % RUN) = to_half(*(const u32x16 *)(values + i));
    }
}
