/* See linear.h. Phase 0 takes the inputs in, phase 1 computes blocks of output rows of all matrices. */
#include "linear.h"

#include <stddef.h>
#include <stdlib.h>

#include "blocks.h"
#include "inputs.h"

enum { TAKE, COMPUTE };

struct tm_linear_work {
    tm_task task;              /* first: the pool hands it back */
    tm_pool *pool;
    const tm_level *level;
    const tm_linear_call *call;
    tm_inputs inputs;
    tm_matrix views[TM_LINEAR_MATRICES];
    int cols, tokens, quantised, unit;
    long first_unit[TM_LINEAR_MATRICES + 1];
    const void **rows, **quantised_rows; /* [tokens]: the inputs, for float and for quantised weights */
    float *scratch;                      /* [threads][tokens][TM_BLOCK_ROWS] */
    char *memory;
};

static void work_units(tm_task *task, int phase, long begin, long end, int worker);

tm_linear_work *tm_linear_work_new(tm_pool *pool, int cols, int tokens)
{
    if (cols < 1 || tokens < 1 || cols > 1 << 24 || tokens > 1 << 20)
        return NULL;
    long inputs = tm_inputs_bytes(cols, tokens);
    long scratch = (long)sizeof(float) * tm_pool_threads(pool) * tokens * TM_BLOCK_ROWS;
    long rows = 2 * (long)sizeof(void *) * tokens;
    tm_linear_work *work = calloc(1, sizeof *work);
    char *memory = aligned_alloc(TM_ALIGN, (size_t)tm_round_up(inputs + scratch + rows, TM_ALIGN));
    if (!work || !memory) {
        free(work);
        free(memory);
        return NULL;
    }
    work->task.run = work_units, work->task.phases = 2;
    work->pool = pool, work->memory = memory;
    atomic_init(&work->task.done, 1);
    work->cols = cols, work->tokens = tokens;
    work->scratch = (float *)(void *)(memory + inputs);
    work->rows = (const void **)(void *)(memory + inputs + scratch);
    work->quantised_rows = work->rows + tokens;
    return work;
}

void tm_linear_work_free(tm_linear_work *work)
{
    if (!work)
        return;
    tm_pool_wait(work->pool, &work->task);
    free(work->memory);
    free(work);
}

static void take_rows(tm_linear_work *work, long begin, long end)
{
    const tm_linear_call *call = work->call;
    long bytes = (long)work->inputs.cols * tm_type_bytes[call->x_type];
    for (long r = begin; r < end; r++)
        tm_inputs_take(&work->inputs, work->level, r, (const char *)call->x + r * bytes, call->x_type, work->quantised);
}

static void write_out(const tm_linear_work *work, const tm_linear *l, const float *block, long row, long n)
{
    const tm_linear_call *call = work->call;
    float line[TM_BLOCK_ROWS];
    for (long t = 0; t < call->tokens; t++) {
        for (long i = 0; i < n; i++)
            line[i] = block[t * n + i] + (l->bias ? l->bias[row + i] : 0.0f);
        char *to = (char *)l->out + (t * l->out_stride + row) * tm_type_bytes[call->out_type];
        work->level->narrow(call->out_type, line, to, n);
    }
}

/* Units [begin, end) of one matrix, counted from its first. */
static void compute(const tm_linear_work *work, int matrix, long begin, long end, float *scratch)
{
    const tm_linear *l = &work->call->matrices[matrix];
    const void *const *x = tm_is_float(l->format) ? work->rows : work->quantised_rows;
    long row = begin * work->unit, n = (end - begin) * work->unit;
    n = row + n > l->rows ? l->rows - row : n;
    tm_dot *const *dot = work->call->many ? work->level->dot_many : work->level->dot;
    dot[l->format](&work->views[matrix], row, n, x, work->call->tokens, scratch, n);
    write_out(work, l, scratch, row, n);
}

static void work_units(tm_task *task, int phase, long begin, long end, int worker)
{
    tm_linear_work *work = (tm_linear_work *)task;
    float *scratch = work->scratch + (long)worker * work->tokens * TM_BLOCK_ROWS;
    if (phase == TAKE) {
        take_rows(work, begin, end);
        return;
    }
    for (int m = 0; begin < end; m++) {
        long first = work->first_unit[m], last = work->first_unit[m + 1] < end ? work->first_unit[m + 1] : end;
        if (begin >= last)
            continue;
        compute(work, m, begin - first, last - first, scratch);
        begin = last;
    }
}

static int view_matrices(tm_linear_work *work, const tm_linear_call *call)
{
    work->quantised = 0;
    for (int i = 0; i < call->count; i++) {
        const tm_linear *l = &call->matrices[i];
        if (!tm_matrix_view(&work->views[i], l->format, l->rows, l->cols, l->blob) || l->cols != call->matrices[0].cols)
            return TM_ERR_SHAPE;
        work->quantised |= !tm_is_float(l->format);
        work->first_unit[i + 1] = work->first_unit[i] + tm_units(l->rows, work->unit);
    }
    return TM_OK;
}

static int prepare(tm_linear_call *call)
{
    tm_linear_work *work = call->work;
    if (call->tokens < 1 || call->tokens > work->tokens || call->count < 1 || call->count > TM_LINEAR_MATRICES
        || call->matrices[0].cols > work->cols)
        return TM_ERR_ROOM;
    if (call->x_type < 0 || call->x_type >= TM_TYPES || call->out_type < 0 || call->out_type >= TM_TYPES)
        return TM_ERR_TYPE;
    work->call = call;
    work->level = tm_level_now();
    work->unit = tm_unit_rows(call->many);
    return view_matrices(work, call);
}

static void point_inputs(tm_linear_work *work)
{
    tm_inputs_init(&work->inputs, work->call->matrices[0].cols, work->call->tokens, work->memory);
    for (long r = 0; r < work->call->tokens; r++) {
        work->rows[r] = tm_inputs_row(&work->inputs, TM_F32, r);
        work->quantised_rows[r] = tm_inputs_row(&work->inputs, TM_Q4_0, r);
    }
}

int tm_linear_submit(tm_linear_call *call)
{
    tm_linear_work *work = call->work;
    call->status = prepare(call);
    if (call->status != TM_OK)
        return call->status;
    point_inputs(work);
    /* One row is quantised here: a phase of its own would cost more. */
    if (call->tokens == 1)
        take_rows(work, 0, 1);
    work->task.units[TAKE] = call->tokens == 1 ? 0 : call->tokens;
    work->task.grain[TAKE] = 1;
    work->task.units[COMPUTE] = work->first_unit[call->count];
    work->task.grain[COMPUTE] = tm_unit_grain(work->unit);
    tm_pool_submit(work->pool, &work->task);
    return TM_OK;
}

void tm_linear_wait(tm_linear_call *call) { tm_pool_wait(call->work->pool, &call->work->task); }

void tm_linear_run(void *call)
{
    if (tm_linear_submit(call) == TM_OK)
        tm_linear_wait(call);
}
