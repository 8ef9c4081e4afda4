/* The worker pool: threads that split tasks into units, stay hot for a while, then sleep.
 *
 * A task is a struct of its owner that starts with a tm_task. It runs in phases; the units of a phase may run in any
 * order on any worker, the next phase starts when all of them are done. Tasks of one pool run one after the other,
 * in the order of submission. Nothing here allocates once the pool is made. A pool never needs its helpers: who
 * waits works too, so that a pool without helpers (or after a fork) is only slower.
 */
#ifndef TM_POOL_H
#define TM_POOL_H

#include <stdatomic.h>
#include <stdint.h>

enum { TM_PHASES = 4 };

typedef struct tm_pool tm_pool;
typedef struct tm_task tm_task;

struct tm_task {
    /* Do units [begin, end) of a phase. `worker` < tm_pool_threads() is not used by anyone else meanwhile. */
    void (*run)(tm_task *task, int phase, long begin, long end, int worker);
    long units[TM_PHASES];     /* set before submission; phases after `phases` are not looked at */
    long grain[TM_PHASES];     /* at most so many units are taken at once */
    int phases;
    /* The pool's own. */
    _Atomic uint32_t done;
    tm_task *next;
};

/* `threads` counts whoever waits, too: threads - 1 helpers are started. After `hot_us` microseconds without work they
 * sleep. NULL with errno set where a thread or memory cannot be had. */
tm_pool *tm_pool_new(int threads, long hot_us);
/* No task may be in flight. */
void tm_pool_free(tm_pool *pool);
int tm_pool_threads(const tm_pool *pool);
/* Helpers that run: fewer than threads - 1 where the system refused. */
int tm_pool_helpers(const tm_pool *pool);

/* Queue a task; the caller owns its memory until it has waited. */
void tm_pool_submit(tm_pool *pool, tm_task *task);
/* Work until the task is done. Any thread may wait, for any task. */
void tm_pool_wait(tm_pool *pool, tm_task *task);

#endif
