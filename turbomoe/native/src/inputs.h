/* Rows of activations on their way into kernels: widened to float, and quantised where the weights are. */
#ifndef TM_INPUTS_H
#define TM_INPUTS_H

#include "level.h"

typedef struct {
    int cols, rows;         /* room for so many rows */
    float *floats;          /* [rows][cols] */
    char *acts;             /* [rows][act_bytes] */
    long act_bytes;
} tm_inputs;

long tm_inputs_bytes(int cols, int rows);
void tm_inputs_init(tm_inputs *in, int cols, int rows, void *memory);

/* Row `r` as a kernel for `format` wants it. */
static inline void *tm_inputs_row(const tm_inputs *in, int format, long r)
{
    return tm_is_float(format) ? (void *)(in->floats + r * in->cols) : (void *)(in->acts + r * in->act_bytes);
}

/* Take row `r` in from values of a TM_TYPE, and quantise it where `quantised`. */
void tm_inputs_take(const tm_inputs *in, const tm_level *level, long r, const void *from, int type, int quantised);

/* Zero the padding of quantised row `r`, which kernels read; only for rows that are quantised group by group. */
void tm_inputs_pad(const tm_inputs *in, const tm_level *level, long r);

static const int tm_type_bytes[TM_TYPES] = {4, 2, 2};

#endif
