/* See inputs.h. */
#include "inputs.h"

#include <string.h>

long tm_inputs_bytes(int cols, int rows)
{
    long floats = tm_round_up((long)sizeof(float) * cols * rows, TM_ALIGN);
    return floats + tm_round_up(tm_act_bytes(cols), TM_ALIGN) * rows;
}

void tm_inputs_init(tm_inputs *in, int cols, int rows, void *memory)
{
    *in = (tm_inputs){cols, rows, memory, NULL, tm_round_up(tm_act_bytes(cols), TM_ALIGN)};
    in->acts = (char *)memory + tm_round_up((long)sizeof(float) * cols * rows, TM_ALIGN);
}

/* Zero groups behind the row, up to a whole step: kernels read them. */
static void pad(tm_act act, int cols)
{
    long g = cols / TM_GROUP, n = tm_round_up(cols, TM_STEP) / TM_GROUP - g;
    memset(act.first + 16 * g, 0, (size_t)(16 * n));
    memset(act.second + 16 * g, 0, (size_t)(16 * n));
    memset(act.scale + g, 0, (size_t)n * sizeof(float));
    memset(act.sum + g, 0, (size_t)n * sizeof(float));
    memset(act.sum2 + g, 0, (size_t)n * sizeof(float));
}

void tm_inputs_pad(const tm_inputs *in, long r)
{
    if (in->cols % TM_STEP)
        pad(tm_act_at(tm_inputs_row(in, 0, r), in->cols), in->cols);
}

void tm_inputs_take(const tm_inputs *in, const tm_level *level, long r, const void *from, int type, int quantised)
{
    float *floats = in->floats + r * in->cols;
    level->widen(type, from, floats, in->cols);
    if (!quantised)
        return;
    level->quantise(floats, tm_act_at(tm_inputs_row(in, 0, r), in->cols), 0, in->cols / TM_GROUP);
    tm_inputs_pad(in, r);
}
