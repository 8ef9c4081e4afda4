/* See decoder.h. */
#include "decoder.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "level.h"

enum { SERIAL = 1 << 15, LONG_SPLIT = 256 }; /* values read by one head group below which nobody is woken; keys a unit */

struct tm_decoder_work {
    tm_task task;              /* first: the pool hands it back */
    tm_pool *pool;
    const tm_level *level;
    int hidden, wide, heads, dim, splits;
    tm_attend ask;             /* of the layer that is being computed */
    long keys;                 /* that it sees, and in how many parts */
    int parts;
    float *normed, *projected, *rotated, *waves, *offset, *fresh, *mixed;
    tm_softmax *states;        /* [kv_heads][parts][group]: at most heads * splits */
    char *memory;
};

static void attend_units(tm_task *task, int phase, long begin, long end, int worker);

tm_decoder_work *tm_decoder_work_new(tm_pool *pool, int hidden, int wide, int heads, int dim)
{
    if (hidden < 1 || wide < 1 || heads < 1 || dim < 1 || dim > TM_HEAD_DIM || heads > 1 << 12 || wide > 1 << 24)
        return NULL;
    tm_decoder_work *work = calloc(1, sizeof *work);
    int splits = tm_pool_threads(pool) > 1 ? 2 * tm_pool_threads(pool) : 1;
    long each = (long)heads * dim, floats = hidden + wide + 2 * each + heads + 2 * each + each;
    long bytes = (long)sizeof(tm_softmax) * heads * splits + (long)sizeof(float) * (floats + 8 * 16);
    char *memory = aligned_alloc(TM_ALIGN, (size_t)tm_round_up(bytes, TM_ALIGN));
    if (!work || !memory) {
        free(work);
        free(memory);
        return NULL;
    }
    *work = (tm_decoder_work){.task = {.run = attend_units, .phases = 1}, .pool = pool, .memory = memory,
                              .hidden = hidden, .wide = wide, .heads = heads, .dim = dim, .splits = splits};
    atomic_init(&work->task.done, 1);
    work->states = (tm_softmax *)(void *)memory;
    float *at = (float *)(void *)(work->states + (long)heads * splits);
    work->normed = at, at += hidden;
    work->projected = at, at += wide;
    work->rotated = at, at += each;
    work->waves = at, at += each;
    work->offset = at, at += heads;
    work->fresh = at, at += 2 * each;
    work->mixed = at;
    return work;
}

void tm_decoder_work_free(tm_decoder_work *work)
{
    if (!work)
        return;
    tm_pool_wait(work->pool, &work->task);
    free(work->memory);
    free(work);
}

/* out [rows of all matrices] = projections of x. */
static int project(const tm_decoder_call *call, const tm_projection *p, const float *x, float *out)
{
    tm_linear_call linear = {.work = call->linear, .count = p->count, .tokens = 1, .x = x};
    for (int i = 0; i < p->count; i++) {
        linear.matrices[i] = p->matrices[i];
        linear.matrices[i].out = out;
        out += p->matrices[i].rows;
    }
    tm_linear_run(&linear);
    return linear.status;
}

static void turn(float *head, const float *cos, const float *sin, int channels)
{
    int half = channels / 2;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] + b * sin[i];
        head[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

/* Normalised Walsh-Hadamard transform in Sylvester order. */
static void hadamard(float *x, long n)
{
    for (long half = 1; half < n; half *= 2)
        for (long at = 0; at < n; at += 2 * half)
            for (long i = at; i < at + half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    float scale = 1.0f / sqrtf((float)n);
    for (long i = 0; i < n; i++)
        x[i] *= scale;
}

static int stored_type(const tm_kv_layer *l, const tm_kv_side *s)
{
    static const int types[] = {TM_TYPE_F32, TM_TYPE_BF16, TM_TYPE_F16};
    return tm_paged(l) ? types[s->kind] : s->exact_type;
}

/* The new token's vectors as they will be stored. */
static void round_new(const tm_decoder_work *work, const tm_kv_side *s, const float *x, float *to)
{
    const tm_kv_layer *l = work->ask.layer;
    uint16_t line[2 * TM_HEAD_DIM];
    int type = stored_type(l, s);
    for (long at = 0; at < l->kv_heads * l->dim; at += l->dim) {
        work->level->narrow(type, x + at, line, l->dim);
        work->level->widen(type, line, to + at, l->dim);
    }
}

/* Keep them where the next tokens look. The ring's oldest row gives way: everyone must have looked at it. */
static void keep(const tm_decoder_work *work, const tm_kv_side *s, const float *rounded)
{
    const tm_kv_layer *l = work->ask.layer;
    long t = work->ask.length;
    int type = stored_type(l, s);
    long bytes = (long)l->dim * tm_type_bytes[type];
    for (long head = 0; head < l->kv_heads; head++) {
        const float *x = rounded + head * l->dim;
        long place = work->ask.slot * l->kv_heads + head;
        if (tm_paged(l)) {
            long row = (work->ask.pages[t / TM_PAGE_TOKENS] * l->kv_heads + head) * TM_PAGE_TOKENS + t % TM_PAGE_TOKENS;
            work->level->narrow(type, x, (char *)s->codes + row * bytes, l->dim);
        }
        if (t < l->sink)
            work->level->narrow(type, x, (char *)s->sinks + (place * l->sink + t) * bytes, l->dim);
        if (l->recent)
            work->level->narrow(type, x, (char *)s->ring + (place * l->recent + t % l->recent) * bytes, l->dim);
    }
}

/* The score of a mean: what stays of it, returned, and by which cosines and sines the rest comes and goes. */
static float mean_score(const float *q, const float *mean, int dim, int pairs, float *waves)
{
    for (int i = 0; i < pairs; i++) {
        waves[i] = q[i] * mean[i] + q[pairs + i] * mean[pairs + i];
        waves[pairs + i] = q[pairs + i] * mean[i] - q[i] * mean[pairs + i];
    }
    float still = 0.0f;
    for (int i = 2 * pairs; i < dim; i++)
        still += q[i] * mean[i];
    return still;
}

/* What the queries need for codes: the scaled and rotated form, and the score of the mean. */
static void prepare_codes(tm_decoder_work *work)
{
    tm_attend *a = &work->ask;
    const tm_kv_layer *l = a->layer;
    long group = l->heads / l->kv_heads;
    int coded = tm_keys_seen(a).coded > 0;
    a->rotated = coded && tm_kv_rotated(l->keys.kind) ? work->rotated : NULL;
    a->offset = coded && l->keys.mean ? work->offset : NULL;
    a->waves = work->waves;
    for (long h = 0; a->rotated && h < l->heads; h++) {
        for (int i = 0; i < l->dim; i++)
            work->rotated[h * l->dim + i] = a->query[h * l->dim + i] * l->signs[i]
                                            * (l->keys.scale ? l->keys.scale[h / group * l->dim + i] : 1.0f);
        hadamard(work->rotated + h * l->dim, l->dim);
    }
    for (long h = 0; a->offset && h < l->heads; h++)
        work->offset[h] = mean_score(a->query + h * l->dim, l->keys.mean + h / group * l->dim, l->dim, l->keys.pairs,
                                     work->waves + h * 2 * l->keys.pairs);
}

static void attend_units(tm_task *task, int phase, long begin, long end, int worker)
{
    (void)phase;
    (void)worker;
    tm_decoder_work *work = (tm_decoder_work *)task;
    const tm_kv_layer *l = work->ask.layer;
    long group = l->heads / l->kv_heads;
    for (long unit = begin; unit < end; unit++) {
        tm_softmax *states = work->states + unit * group;
        long part = unit % work->parts;
        for (long g = 0; g < group; g++)
            states[g] = (tm_softmax){.top = -INFINITY};
        work->level->attend(&work->ask, unit / work->parts, work->keys * part / work->parts,
                            work->keys * (part + 1) / work->parts, states);
    }
}

/* Take `other` into `into`. */
static void merge(tm_softmax *into, const tm_softmax *other, long dim)
{
    if (other->total == 0.0f)
        return;
    float top = other->top > into->top || other->top != other->top ? other->top : into->top;
    float a = into->total == 0.0f ? 0.0f : expf(into->top - top), b = expf(other->top - top);
    into->top = top;
    into->total = into->total * a + other->total * b;
    into->coded = into->coded * a + other->coded * b;
    for (long i = 0; i < dim; i++) {
        into->plain[i] = into->plain[i] * a + other->plain[i] * b;
        into->rotated[i] = into->rotated[i] * a + other->rotated[i] * b;
    }
}

static void finish(const tm_decoder_work *work, tm_softmax *s, long kv_head, float *out)
{
    const tm_kv_layer *l = work->ask.layer;
    long dim = l->dim;
    int rotated = tm_kv_rotated(l->values.kind) && s->coded != 0.0f;
    if (rotated)
        hadamard(s->rotated, dim);
    for (long i = 0; i < dim; i++) {
        float y = s->plain[i] + (rotated ? s->rotated[i] * l->signs[i] : 0.0f);
        y += l->values.mean ? s->coded * l->values.mean[kv_head * dim + i] : 0.0f;
        out[i] = y / s->total;
    }
}

/* out [heads][dim] of the question in `ask`. */
static void attend(tm_decoder_work *work, float *out)
{
    const tm_kv_layer *l = work->ask.layer;
    long group = l->heads / l->kv_heads;
    tm_seen n = tm_keys_seen(&work->ask);
    work->keys = n.sinks + n.ring + n.coded + 1;
    long most = work->keys / LONG_SPLIT + 1;
    int alone = work->keys * l->kv_heads * l->dim < SERIAL || work->splits == 1;
    work->parts = alone ? 1 : most < work->splits ? (int)most : work->splits;
    long units = (long)l->kv_heads * work->parts;
    if (alone)
        attend_units(&work->task, 0, 0, units, 0);
    else {
        work->task.units[0] = units, work->task.grain[0] = 1;
        tm_pool_submit(work->pool, &work->task);
        tm_pool_wait(work->pool, &work->task);
    }
    for (long h = 0; h < l->kv_heads; h++)
        for (long g = 0; g < group; g++) {
            tm_softmax *first = work->states + h * work->parts * group + g;
            for (int part = 1; part < work->parts; part++)
                merge(first, first + part * group, l->dim);
            finish(work, first, h, out + (h * group + g) * l->dim);
        }
}

static int mix(tm_decoder_work *work, const tm_decoder_call *call, const tm_decoder_layer *layer)
{
    const tm_kv_layer *l = &layer->kv;
    long heads = l->heads + l->kv_heads, dim = l->dim;
    float *q = work->projected, *k = q + l->heads * dim, *v = k + l->kv_heads * dim;
    work->level->norm(call->x, layer->mixer_norm, work->normed, call->hidden, layer->eps);
    int status = project(call, &layer->qkv, work->normed, q);
    if (status != TM_OK)
        return status;
    for (long h = 0; h < heads; h++) {
        if (layer->head_norm)
            work->level->norm(q + h * dim, layer->head_norm + h * dim, q + h * dim, dim, layer->eps);
        turn(q + h * dim, call->cos, call->sin, layer->rotary);
    }
    for (long i = 0; i < l->heads * dim; i++)
        q[i] *= layer->scale;
    work->ask = (tm_attend){.layer = l, .slot = call->slot, .length = call->length, .pages = call->pages, .query = q};
    prepare_codes(work);
    float *key = work->fresh, *value = key + l->kv_heads * dim;
    round_new(work, &l->keys, k, key);
    round_new(work, &l->values, v, value);
    work->ask.key = key, work->ask.value = value;
    attend(work, work->mixed);
    keep(work, &l->keys, key);
    keep(work, &l->values, value);
    status = project(call, &layer->out, work->mixed, work->normed);
    for (long i = 0; status == TM_OK && i < call->hidden; i++)
        call->x[i] += work->normed[i];
    return status;
}

static int feed(tm_decoder_work *work, const tm_decoder_call *call, const tm_decoder_layer *layer)
{
    long width = layer->up.rows / 2;
    float *gate = work->projected;
    if (!layer->up.count)
        return TM_OK;
    work->level->norm(call->x, layer->ffn_norm, work->normed, call->hidden, layer->eps);
    int status = project(call, &layer->up, work->normed, gate);
    if (status != TM_OK)
        return status;
    work->level->gate(TM_SILU, gate, gate + width, width, 1.0f, INFINITY);
    status = project(call, &layer->down, gate, work->normed);
    for (long i = 0; status == TM_OK && i < call->hidden; i++)
        call->x[i] += work->normed[i];
    return status;
}

static int fits(const tm_decoder_work *work, const tm_decoder_call *call, const tm_decoder_layer *layer)
{
    const tm_kv_layer *l = &layer->kv;
    return call->hidden <= work->hidden && layer->qkv.rows <= work->wide && layer->up.rows <= work->wide
           && l->heads <= work->heads && l->dim <= work->dim && l->dim % 16 == 0 && l->kv_heads >= 1
           && l->heads % l->kv_heads == 0 && l->heads / l->kv_heads <= TM_GROUP_QUERIES
           && l->keys.pairs >= 0 && 2 * l->keys.pairs <= l->dim && layer->rotary <= l->dim && layer->rotary % 2 == 0
           && layer->qkv.rows == (l->heads + 2 * l->kv_heads) * l->dim;
}

void tm_decoder_run(void *argument)
{
    tm_decoder_call *call = argument;
    tm_decoder_work *work = call->work;
    work->level = tm_level_now();
    call->status = TM_OK;
    for (int i = 0; i < call->count && call->status == TM_OK; i++) {
        const tm_decoder_layer *layer = &call->layers[i];
        call->status = fits(work, call, layer) ? mix(work, call, layer) : TM_ERR_ROOM;
        if (call->status == TM_OK)
            call->status = feed(work, call, layer);
    }
}
