#ifndef TM_NEAREST_H
#define TM_NEAREST_H

#include <string.h>

#include "level.h"

/* Round to the nearest integer (ties to even), |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits. */
INLINE int32_t nearest(float x)
{
    const float magic = 0x1.8p23f;
    int32_t bits;
    x += magic;
    memcpy(&bits, &x, sizeof bits);
    return bits - 0x4b400000;
}

#endif
