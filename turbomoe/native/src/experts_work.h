/* The inside of tm_experts_work: shared by experts_work.c (its memory) and experts.c (what happens in it). */
#ifndef TM_EXPERTS_WORK_H
#define TM_EXPERTS_WORK_H

#include "experts.h"
#include "inputs.h"
#include "routes.h"

struct tm_experts_work {
    tm_task task;              /* first: the pool hands it back */
    tm_pool *pool;
    const tm_level *level;
    tm_dot *const *dot;        /* the level's, for this call */
    const tm_experts_call *call;
    tm_experts_room room;
    tm_routes routes;
    tm_inputs x, h;            /* the rows; the inside of every pair */
    tm_matrix gate, up, down;  /* of any expert: the blob is to be filled in */
    int x_quantised, h_quantised;
    int unit;                  /* output rows of a unit */
    long h_units, h_groups;    /* of one slot */
    const void **x_of, **h_of; /* [pairs]: inputs of gate and up, and of down */
    _Atomic int *missing;      /* [slots * h_groups]: units until 32 values of h are whole */
    float *scratch;            /* [threads][pairs][TM_BLOCK_ROWS] */
    void *x_memory, *h_memory, *memory;
};

/* experts.c's, the body of the task. */
void tm_experts_work_units(tm_task *task, int phase, long begin, long end, int worker);

#endif
