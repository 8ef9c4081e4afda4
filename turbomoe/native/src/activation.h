/* The form in which activations meet quantised weights: int8 in groups of 32.
 *
 * A row of `cols` values, padded with zeros to TM_STEP, is
 *   int8  values[padded]
 *   float scale[padded / 32]   largest magnitude / 127
 *   float sum[padded / 32]     scale * (sum of the group's int8)
 *   float sum2[padded / 32]    the same over the second half alone
 * The order of values and scales within a step is the level's own (kernels.h): who quantises a row must also read it.
 * For float weights a row stays `cols` floats.
 */
#ifndef TM_ACTIVATION_H
#define TM_ACTIVATION_H

#include "formats.h"

typedef struct {
    int8_t *values;
    float *scale, *sum, *sum2;
} tm_act;

static inline long tm_act_bytes(int cols)
{
    long padded = tm_round_up(cols, TM_STEP);
    return padded + 3 * padded / TM_GROUP * (long)sizeof(float);
}

static inline tm_act tm_act_at(void *row, int cols)
{
    long padded = tm_round_up(cols, TM_STEP), groups = padded / TM_GROUP;
    float *factors = (float *)((char *)row + padded);
    return (tm_act){(int8_t *)row, factors, factors + groups, factors + 2 * groups};
}

#endif
