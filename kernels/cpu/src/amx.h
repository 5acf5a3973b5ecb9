/* What the two users of the matrix unit share. Include only where it is compiled in. */
#ifndef PETAL_AMX_H
#define PETAL_AMX_H

#include <immintrin.h>
#include <stdint.h>

enum { HEIGHT = 16 /* most rows of a register */, LINE = 64 /* bytes of a register's row */ };

/* Compilers do not see that the intrinsics read memory: what is written before must be there. */
static inline void publish(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/* Gives eight registers their shapes; one without rows is not used. */
static inline void configure(const long rows[8], const long row_bytes[8])
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = (uint16_t)(rows[i] ? row_bytes[i] : 0);
        c.rows[i] = (uint8_t)(row_bytes[i] ? rows[i] : 0);
    }
    publish(&c);
    _tile_loadconfig(&c);
}

#endif
