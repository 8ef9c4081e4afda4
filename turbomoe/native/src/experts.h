/* The routed experts of one layer, fused: gate and up, the activation function, down, the weighted sum. */
#ifndef TM_EXPERTS_H
#define TM_EXPERTS_H

#include <stdint.h>

#include "errors.h"
#include "pool.h"

/* How every expert of a layer lies in its blob. Offsets in bytes, multiples of 64; biases are float32, -1 for none. */
typedef struct {
    int hidden, width, experts;
    int gate_format, up_format, down_format;
    int64_t gate_at, up_at, down_at;
    int64_t gate_bias_at, up_bias_at, down_bias_at;
    int gate;                      /* TM_SILU ... */
    float alpha, limit;            /* of TM_SWIGLU_CLIPPED */
    const void *const *blobs;      /* [experts]; NULL for an expert that has no weights here */
} tm_experts;

typedef struct tm_experts_work tm_experts_work;

/* What a work has memory for: layers up to this size, and so many rows with so many experts each. */
typedef struct {
    int hidden, width, experts, rows, top;
} tm_experts_room;

/* NULL if the memory cannot be had, or a number is out of range. */
tm_experts_work *tm_experts_work_new(tm_pool *pool, const tm_experts_room *room);
/* Waits for a call in flight. */
void tm_experts_work_free(tm_experts_work *work);

typedef struct {
    tm_experts_work *work;         /* one call in flight per work */
    const tm_experts *layer;
    int rows, top;
    int hidden_type, out_type;     /* TM_TYPE_... */
    int many;                      /* prefill: the faster kernels for many tokens, see tm_level.dot_many */
    const void *hidden;            /* [rows][hidden] */
    const int64_t *ids;            /* [rows][top]; a negative id is left out of the sum */
    const float *weights;          /* [rows][top] */
    void *out;                     /* [rows][hidden], overwritten */
    int status;                    /* TM_OK or an error, set by submit */
} tm_experts_call;

/* Start out[r] = sum over j, in this order, of weights[r][j] * expert ids[r][j] (hidden[r]). Nothing is started
 * unless TM_OK is returned. */
int tm_experts_submit(tm_experts_call *call);
void tm_experts_wait(tm_experts_call *call);
/* Both at once, in the form of a host callback. */
void tm_experts_run(void *call);

#endif
