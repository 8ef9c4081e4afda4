/* Dense linear layers over packed matrices that share an input. */
#ifndef TM_LINEAR_H
#define TM_LINEAR_H

#include "errors.h"
#include "pool.h"

enum { TM_LINEAR_MATRICES = 8 };

typedef struct {
    int format, rows, cols;
    const void *blob;
    const float *bias;         /* [rows], or NULL */
    void *out;                 /* [tokens][out_stride] of the call's out_type */
    long out_stride;
} tm_linear;

typedef struct tm_linear_work tm_linear_work;

/* Memory for up to `tokens` rows of up to `cols` values. NULL if it cannot be had. */
tm_linear_work *tm_linear_work_new(tm_pool *pool, int cols, int tokens);
/* Waits for a call in flight. */
void tm_linear_work_free(tm_linear_work *work);

typedef struct {
    tm_linear_work *work;      /* one call in flight per work */
    int count, tokens;
    const void *x;             /* [tokens][cols] of type x_type */
    int x_type, out_type;
    int many;                  /* prefill: the faster kernels for many tokens, see tm_level.dot_many */
    int status;                /* TM_OK or an error, set by submit */
    tm_linear matrices[TM_LINEAR_MATRICES];
} tm_linear_call;

/* Start out = x . matrix^T + bias for every matrix; nothing is started unless TM_OK is returned. */
int tm_linear_submit(tm_linear_call *call);
void tm_linear_wait(tm_linear_call *call);
/* Both at once, in the form of a host callback. */
void tm_linear_run(void *call);

#endif
