/* See inputs.h. */
#include "inputs.h"

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

void tm_inputs_pad(const tm_inputs *in, const tm_level *level, long r)
{
    static const float zeros[TM_STEP];
    long g = in->cols / TM_GROUP, n = tm_round_up(in->cols, TM_STEP) / TM_GROUP - g;
    level->quantise(zeros, tm_act_at(tm_inputs_row(in, 0, r), in->cols), g, n);
}

void tm_inputs_take(const tm_inputs *in, const tm_level *level, long r, const void *from, int type, int quantised)
{
    float *floats = in->floats + r * in->cols;
    level->widen(type, from, floats, in->cols);
    if (!quantised)
        return;
    level->quantise(floats, tm_act_at(tm_inputs_row(in, 0, r), in->cols), 0, in->cols / TM_GROUP);
    tm_inputs_pad(in, level, r);
}
