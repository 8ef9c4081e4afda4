/* See experts.h.
 *
 * Pairs (row, expert) are sorted by expert; the pairs of one expert are a slot. Phase 0 takes the rows in. Phase 1
 * runs gate and up for blocks of rows of every slot, and whoever completes 32 values of h quantises them. Phase 2
 * runs down for blocks of output rows over all slots, and sums the pairs of a row in routing order.
 */
#include <stdatomic.h>
#include <string.h>

#include "blocks.h"
#include "experts_work.h"

enum { TAKE, INSIDE, OUTPUT };

static const char *blob_of(const tm_experts_work *w, const tm_slot *slot)
{
    return w->call->layer->blobs[slot->expert];
}

/* One of the layer's matrices in a blob. */
static tm_matrix matrix_at(const tm_matrix *any, const char *blob, int64_t at)
{
    tm_matrix m = *any;
    m.blob = (const uint8_t *)blob + at;
    return m;
}

/* Bias of row `row`, or NULL. */
static const float *bias_at(const char *blob, int64_t at, long row)
{
    return at < 0 ? NULL : (const float *)(const void *)(blob + at) + row;
}

static void add_bias(float *to, const float *bias, long n)
{
    if (bias)
        for (long i = 0; i < n; i++)
            to[i] += bias[i];
}

/* ---- phase 1 ---- */

/* h = act(gate) * up for rows [row, row + n) of one expert and all its pairs. Gate lands in h, up in scratch. */
static void inside_rows(tm_experts_work *w, const tm_slot *slot, long row, long n, float *scratch)
{
    const tm_experts *l = w->call->layer;
    const char *blob = blob_of(w, slot);
    const tm_matrix gate = matrix_at(&w->gate, blob, l->gate_at), up = matrix_at(&w->up, blob, l->up_at);
    float *h = w->h.floats + slot->first * l->width + row;
    int pairs = (int)slot->count;
    w->dot[l->gate_format](&gate, row, n, w->x_of + slot->first, pairs, h, l->width);
    w->dot[l->up_format](&up, row, n, w->x_of + slot->first, pairs, scratch, n);
    for (long p = 0; p < pairs; p++) {
        add_bias(h + p * l->width, bias_at(blob, l->gate_bias_at, row), n);
        add_bias(scratch + p * n, bias_at(blob, l->up_bias_at, row), n);
        w->level->gate(l->gate, h + p * l->width, scratch + p * n, n, l->alpha, l->limit);
    }
}

/* Quantise 32 values of h for every pair of a slot. */
static void quantise_group(tm_experts_work *w, const tm_slot *slot, long group)
{
    for (long p = slot->first; p < slot->first + slot->count; p++) {
        const float *h = w->h.floats + p * w->h.cols + group * TM_GROUP;
        w->level->quantise(h, tm_act_at(w->h.acts + p * w->h.act_bytes, w->h.cols), group, 1);
        if (group == 0)
            tm_inputs_pad(&w->h, p);
    }
}

/* Rows [row, row + n) are done: quantise the groups that became whole. */
static void close_groups(tm_experts_work *w, const tm_slot *slot, long row, long n)
{
    _Atomic int *missing = w->missing + (slot - w->routes.slot) * w->h_groups;
    for (long at = row; at < row + n; at += w->unit)
        if (atomic_fetch_sub_explicit(&missing[at / TM_GROUP], 1, memory_order_acq_rel) == 1)
            quantise_group(w, slot, at / TM_GROUP);
}

static void inside(tm_experts_work *w, long begin, long end, float *scratch)
{
    long width = w->call->layer->width;
    for (long unit = begin, next; unit < end; unit = next) {
        const tm_slot *slot = &w->routes.slot[unit / w->h_units];
        long row = unit % w->h_units * w->unit;
        next = (unit / w->h_units + 1) * w->h_units;
        next = next < end ? next : end;
        long n = (next - unit) * w->unit;
        n = row + n > width ? width - row : n;
        inside_rows(w, slot, row, n, scratch);
        if (w->h_quantised)
            close_groups(w, slot, row, n);
    }
}

/* ---- phase 2 ---- */

/* out = sum of the pairs of row `r`, whose results for output rows [row, row + n) are in `parts`. */
static void sum_row(const tm_experts_work *w, long r, const float *parts, long row, long n)
{
    const tm_experts_call *call = w->call;
    const tm_experts *l = call->layer;
    float sum[TM_BLOCK_ROWS] = {0}, term[TM_BLOCK_ROWS];
    for (long j = r * call->top; j < (r + 1) * call->top; j++) {
        if (call->ids[j] < 0)
            continue;
        memcpy(term, parts + w->routes.place[j] * n, (size_t)n * sizeof *term);
        add_bias(term, bias_at(l->blobs[call->ids[j]], l->down_bias_at, row), n);
        for (long i = 0; i < n; i++)
            sum[i] += call->weights[j] * term[i];
    }
    char *out = (char *)call->out + (r * l->hidden + row) * tm_type_bytes[call->out_type];
    w->level->narrow(call->out_type, sum, out, n);
}

static void output(tm_experts_work *w, long begin, long end, float *scratch)
{
    const tm_experts *l = w->call->layer;
    long row = begin * w->unit, n = (end - begin) * w->unit;
    n = row + n > l->hidden ? l->hidden - row : n;
    for (long s = 0; s < w->routes.slots; s++) {
        const tm_slot *slot = &w->routes.slot[s];
        const tm_matrix down = matrix_at(&w->down, blob_of(w, slot), l->down_at);
        w->dot[l->down_format](&down, row, n, w->h_of + slot->first, (int)slot->count,
                                      scratch + slot->first * n, n);
    }
    for (long r = 0; r < w->call->rows; r++)
        sum_row(w, r, scratch, row, n);
}

/* ---- all phases ---- */

static void take_rows(tm_experts_work *w, long begin, long end)
{
    const tm_experts_call *call = w->call;
    long bytes = (long)call->layer->hidden * tm_type_bytes[call->hidden_type];
    for (long r = begin; r < end; r++)
        tm_inputs_take(&w->x, w->level, r, (const char *)call->hidden + r * bytes, call->hidden_type, w->x_quantised);
}

void tm_experts_work_units(tm_task *task, int phase, long begin, long end, int worker)
{
    tm_experts_work *w = (tm_experts_work *)task;
    float *scratch = w->scratch + (long)worker * w->room.rows * w->room.top * TM_BLOCK_ROWS;
    if (phase == TAKE)
        take_rows(w, begin, end);
    else if (phase == INSIDE)
        inside(w, begin, end, scratch);
    else
        output(w, begin, end, scratch);
}

/* ---- submission ---- */

static int check(const tm_experts_call *call)
{
    const tm_experts *l = call->layer;
    tm_experts_work *w = call->work;
    const tm_experts_room *room = &w->room;
    if (call->rows < 1 || call->top < 1 || call->rows > room->rows || call->top > room->top || l->hidden > room->hidden
        || l->width > room->width || l->experts > room->experts)
        return TM_ERR_ROOM;
    if (!tm_matrix_view(&w->gate, l->gate_format, l->width, l->hidden, NULL)
        || !tm_matrix_view(&w->up, l->up_format, l->width, l->hidden, NULL)
        || !tm_matrix_view(&w->down, l->down_format, l->hidden, l->width, NULL)
        || tm_is_float(l->gate_format) != tm_is_float(l->up_format)) /* they share one form of the input */
        return TM_ERR_SHAPE;
    int types = call->hidden_type >= 0 && call->hidden_type < TM_TYPES && call->out_type >= 0
                && call->out_type < TM_TYPES && l->gate >= 0 && l->gate < TM_GATES;
    return types ? TM_OK : TM_ERR_TYPE;
}

/* Which input every pair reads, and how many units make a group of h whole. */
static void point_inputs(tm_experts_work *w, const tm_experts *l)
{
    const tm_routes *routes = &w->routes;
    tm_inputs_init(&w->x, l->hidden, w->call->rows, w->x_memory);
    tm_inputs_init(&w->h, l->width, (int)routes->pairs, w->h_memory);
    for (long p = 0; p < routes->pairs; p++) {
        w->x_of[p] = tm_inputs_row(&w->x, l->gate_format, routes->row[p]);
        w->h_of[p] = tm_inputs_row(&w->h, l->down_format, p);
    }
    w->h_groups = (l->width + TM_GROUP - 1) / TM_GROUP;
    for (long i = 0; w->h_quantised && i < routes->slots * w->h_groups; i++)
        atomic_store_explicit(&w->missing[i], TM_GROUP / w->unit, memory_order_relaxed);
}

static void set_units(tm_experts_work *w)
{
    const tm_experts *l = w->call->layer;
    const tm_routes *routes = &w->routes;
    w->h_units = tm_units(l->width, w->unit);
    /* One row is quantised by the caller: a phase of its own would cost more. */
    w->task.units[TAKE] = w->call->rows > 1 ? w->call->rows : 0;
    w->task.units[INSIDE] = routes->slots * w->h_units;
    w->task.units[OUTPUT] = tm_units(l->hidden, w->unit);
    w->task.grain[TAKE] = 1;
    w->task.grain[INSIDE] = w->task.grain[OUTPUT] = tm_unit_grain(w->unit);
}

int tm_experts_submit(tm_experts_call *call)
{
    tm_experts_work *w = call->work;
    const tm_experts *l = call->layer;
    call->status = check(call);
    if (call->status == TM_OK && tm_routes_sort(&w->routes, call->ids, call->rows, call->top, l->experts, l->blobs))
        call->status = TM_ERR_ROUTE;
    if (call->status != TM_OK)
        return call->status;
    if (!w->routes.slots) { /* every expert is left out: nothing to take in, nobody to wake */
        memset(call->out, 0, (size_t)call->rows * (size_t)l->hidden * (size_t)tm_type_bytes[call->out_type]);
        return TM_OK;
    }
    w->call = call;
    w->level = tm_level_now();
    w->x_quantised = !tm_is_float(l->gate_format) || !tm_is_float(l->up_format);
    w->h_quantised = !tm_is_float(l->down_format);
    w->dot = call->many ? w->level->dot_many : w->level->dot;
    w->unit = tm_unit_rows(call->many);
    point_inputs(w, l);
    set_units(w);
    if (call->rows == 1)
        take_rows(w, 0, 1);
    tm_pool_submit(w->pool, &w->task);
    return TM_OK;
}

void tm_experts_wait(tm_experts_call *call) { tm_pool_wait(call->work->pool, &call->work->task); }

void tm_experts_run(void *call)
{
    if (tm_experts_submit(call) == TM_OK)
        tm_experts_wait(call);
}
