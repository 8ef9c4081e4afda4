/* Rounding one group of 32 activations to int8, in plain C: rounding_x86.h must agree with it bit by bit. */
#include "nearest.h"

/* Largest magnitude as an integer comparison of bit patterns: it vectorises, and NaN wins over every number. */
INLINE float group_peak(const float *x)
{
    int32_t most = 0;
    float result;
    for (int i = 0; i < TM_GROUP; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&result, &most, sizeof result);
    return result;
}

/* q = x * inverse, rounded; `inverse` 0 gives zeros. The sums of both halves of q. */
INLINE void group_round(const float *x, float inverse, int8_t *q, int32_t *sum)
{
    sum[0] = sum[1] = 0;
    for (int i = 0; i < TM_GROUP; i++) {
        int32_t value = inverse == 0.0f ? 0 : nearest(x[i] * inverse);
        q[i] = (int8_t)value;
        sum[i / 16] += value;
    }
}
