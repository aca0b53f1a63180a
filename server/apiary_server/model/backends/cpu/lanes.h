/* Vectors of floats. */

#pragma once

#include <stdint.h>

enum { LANES = 16 }; /* floats that are computed with together; narrower processors take several steps */

/* Which of LANES there are where so many are left. */
static inline uint16_t lanes(int64_t left) {
    return left >= LANES ? 0xffff : left > 0 ? (uint16_t)((1u << left) - 1) : 0;
}
