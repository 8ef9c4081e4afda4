/* Decoder layers of one new token: norms, projections, rotary angles, attention, FFN, all without leaving the core.
 *
 * A layer whose FFN is not computed here (routed experts) stops after attention; the caller goes on from there.
 */
#ifndef TM_DECODER_H
#define TM_DECODER_H

#include "attend.h"
#include "linear.h"
#include "pool.h"

typedef struct {
    int count, rows;           /* 0 matrices: this step is not computed here. `rows`: all their output values */
    tm_linear matrices[3];     /* without `out` */
} tm_projection;

typedef struct {
    tm_kv_layer kv;
    tm_projection qkv, out;    /* queries, keys and values; heads back to the hidden size */
    tm_projection up, down;    /* gate and up projection; down projection */
    const float *mixer_norm, *ffn_norm; /* [hidden] */
    const float *head_norm;    /* [heads + kv_heads][dim], or NULL */
    float eps, scale;          /* of all norms; of scores */
    int rotary;                /* channels of a head that turn, an even number */
} tm_decoder_layer;

typedef struct tm_decoder_work tm_decoder_work;

/* Room for layers of up to `hidden` values, `wide` outputs of a projection, `heads` queries of `dim`. NULL if it cannot
 * be had. */
tm_decoder_work *tm_decoder_work_new(tm_pool *pool, int hidden, int wide, int heads, int dim);
void tm_decoder_work_free(tm_decoder_work *work);

typedef struct {
    tm_decoder_work *work;
    tm_linear_work *linear;    /* with room for the widest input */
    const tm_decoder_layer *layers;
    int count, hidden;
    long slot, length;         /* the sequence's slot, and its tokens before this one */
    const int64_t *pages;
    float *x;                  /* [hidden]: the residual stream, changed in place */
    const float *cos, *sin;    /* [rotary]: cosines, and sines of which the first half is negated */
    int status;
} tm_decoder_call;

/* Run `count` layers and store the token's keys and values. In the form of a host callback. */
void tm_decoder_run(void *call);

#endif
