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

/* x * inverse, rounded, as int8: values 0..15 to `first`, the others to `second`; their sums. 0 gives zeros. */
INLINE void group_round(const float *x, float inverse, int8_t *first, int8_t *second, int32_t *sum)
{
    int8_t *to[2] = {first, second};
    for (int half = 0; half < 2; half++) {
        sum[half] = 0;
        for (int i = 0; i < 16; i++) {
            int32_t q = inverse == 0.0f ? 0 : nearest(x[16 * half + i] * inverse);
            to[half][i] = (int8_t)q;
            sum[half] += q;
        }
    }
}
