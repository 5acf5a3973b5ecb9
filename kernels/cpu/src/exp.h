/* Exponentials of sixteen floats at once, the same on every processor. */
#ifndef PETAL_EXP_H
#define PETAL_EXP_H

#include "tile.h"

static inline f32x16 select16(i32x16 mask, f32x16 yes, f32x16 no)
{
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

/* e^x for x <= 0 within 2 units in the last place; 0 below the smallest normal result. */
static inline f32x16 exp16(f32x16 x)
{
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    i32x16 tiny = x < -87.0f;
    f32x16 shifted = x * 0x1.715476p0f + round;
    f32x16 n = shifted - round;
    f32x16 r = x + n * -0x1.62e4p-1f; /* ln 2 in two parts, the first exact for every n */
    r = r + n * -0x1.7f7d1cp-20f;
    f32x16 p = r * 0x1.6db4e8p-10f + 0x1.123bdep-7f; /* best fit of (e^r - 1 - r) / r^2 */
    p = p * r + 0x1.55545ep-5f;
    p = p * r + 0x1.55548ep-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    f32x16 result = (f32x16)((u32x16)p + ((u32x16)shifted << 23));
    return select16(tiny, (f32x16){0}, result);
}

#endif
