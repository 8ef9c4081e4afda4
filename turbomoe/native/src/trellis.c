/* See trellis.h. */
#include "trellis.h"

#include "level.h"

enum { FEW = 8 }; /* vectors for which nobody is woken, and that a worker takes at once */

typedef struct {
    tm_task task;
    const tm_trellis *job;
} trellis_task;

static void trellis_units(tm_task *task, int phase, long begin, long end, int worker)
{
    (void)phase;
    (void)worker;
    tm_level_now()->trellis(((trellis_task *)task)->job, begin, end);
}

int tm_trellis_encode(tm_pool *pool, const tm_trellis *job, long count)
{
    int dim = job->dim;
    if (job->kind < 0 || job->kind >= TM_TRELLISES || dim < 32 || dim > TM_TRELLIS_DIM || (dim & (dim - 1)))
        return TM_ERR_SHAPE;
    if (!pool || count <= FEW) {
        tm_level_now()->trellis(job, 0, count);
        return TM_OK;
    }
    trellis_task t = {.task = {.run = trellis_units, .units = {count}, .grain = {FEW}, .phases = 1}, .job = job};
    tm_pool_submit(pool, &t.task);
    tm_pool_wait(pool, &t.task);
    return TM_OK;
}
