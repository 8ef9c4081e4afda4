/* See pool.h. Units are taken from per-worker ranges by compare-and-exchange; the worker that finishes the last unit
 * of a phase opens the next one. Nobody waits for a particular worker to arrive, only for units to be done, so a
 * helper that the system has put aside delays the others by the units in its hands and no more. */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "futex.h"
#include "relax.h"

enum { LINE = 64, SPINS = 512 };

/* The units of the current phase that a worker takes first, as begin << 32 | end; others help when theirs are out. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t range;
} lane;

struct tm_pool {
    _Alignas(LINE) _Atomic uint32_t epoch;    /* rises when units appear or a task ends: what idle workers watch */
    _Atomic uint32_t sleepers, waiters;       /* asleep on the epoch: helpers and waiters, waiters alone */
    _Atomic int stop;
    _Alignas(LINE) _Atomic long left;         /* units of the current phase that are not done */
    _Atomic long grain;
    tm_task *task;                            /* these two change only while `left` is 0 */
    int phase;
    _Alignas(LINE) pthread_mutex_t lock;      /* guards the queue and `busy` */
    tm_task *first, *last;
    int busy;
    _Atomic uint32_t caller;                  /* who waits works as worker 0: one at a time */
    _Atomic int forked;                       /* helpers stayed behind in the parent process */
    int threads, helpers;
    int64_t hot_ns;
    pthread_t *threads_of;
    tm_pool *next_pool;
    lane lanes[];
};

/* Every pool of the process, for fork. */
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static tm_pool *pools;

/* Take up to `grain` units from a lane, fewer when it runs low, so that the last ones spread. 0 if there are none.
 *
 * Units taken keep `left` above 0, so task and phase stand still until they are done. The word may have changed and
 * returned to the value that was read: then it names units of another phase that nobody took, which serve as well. */
static long take(tm_pool *pool, lane *from, long *begin)
{
    uint64_t range = atomic_load_explicit(&from->range, memory_order_acquire), rest;
    long n;
    do {
        uint32_t at = (uint32_t)(range >> 32), end = (uint32_t)range;
        if (at >= end)
            return 0;
        long most = atomic_load_explicit(&pool->grain, memory_order_relaxed);
        n = ((long)(end - at) + 3) / 4;
        n = n > most ? most : n;
        *begin = at;
        rest = (uint64_t)(at + (uint32_t)n) << 32 | end;
    } while (!atomic_compare_exchange_weak_explicit(&from->range, &range, rest, memory_order_acq_rel,
                                                    memory_order_acquire));
    return n;
}

static void wake(tm_pool *pool, int threads)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleepers))
        tm_futex_wake(&pool->epoch, atomic_load(&pool->waiters) ? INT_MAX : threads);
}

/* Open a phase: units to all lanes in equal, contiguous shares. */
static void open_phase(tm_pool *pool, tm_task *task, int phase)
{
    long units = task->units[phase], lanes = pool->threads;
    pool->task = task;
    pool->phase = phase;
    atomic_store_explicit(&pool->grain, task->grain[phase] > 0 ? task->grain[phase] : 1, memory_order_relaxed);
    atomic_store_explicit(&pool->left, units, memory_order_relaxed);
    for (long i = 0; i < lanes; i++) {
        uint64_t begin = (uint64_t)(units * i / lanes), end = (uint64_t)(units * (i + 1) / lanes);
        atomic_store_explicit(&pool->lanes[i].range, begin << 32 | end, memory_order_release);
    }
    wake(pool, 1);
}

/* Mark a task done, take the next one from the queue. The task's memory is its owner's again. */
static tm_task *finish(tm_pool *pool, tm_task *task)
{
    pthread_mutex_lock(&pool->lock);
    tm_task *next = pool->first;
    pool->task = NULL;
    if (next)
        pool->first = next->next;
    else
        pool->busy = 0;
    pthread_mutex_unlock(&pool->lock);
    atomic_store_explicit(&task->done, 1, memory_order_release);
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->waiters))
        tm_futex_wake(&pool->epoch, INT_MAX);
    return next;
}

/* Go on with `phase` of `task`, or with the next task that has units. Called by whoever ended the phase before. */
static void go_on(tm_pool *pool, tm_task *task, int phase)
{
    while (task) {
        while (phase < task->phases && task->units[phase] <= 0)
            phase++;
        if (phase < task->phases) {
            open_phase(pool, task, phase);
            return;
        }
        task = finish(pool, task);
        phase = 0;
    }
}

static int is_done(tm_task *task) { return (int)atomic_load_explicit(&task->done, memory_order_acquire); }

/* Do units, the worker's own first, until there are none to take or `awaited` (if any) is done. 0 if there were none.
 *
 * `left` is every worker's, so it is written once a visit and not once a take: units that are done but not yet
 * counted keep the phase open like units in the making. */
static int work(tm_pool *pool, int worker, tm_task *awaited)
{
    long done = 0, begin, n;
    for (int i = 0; i < pool->threads; i++) {
        lane *from = &pool->lanes[(worker + i) % pool->threads];
        while (!(awaited && is_done(awaited)) && (n = take(pool, from, &begin))) {
            pool->task->run(pool->task, pool->phase, begin, begin + n, worker);
            done += n;
        }
    }
    if (done && atomic_fetch_sub_explicit(&pool->left, done, memory_order_acq_rel) == done)
        go_on(pool, pool->task, pool->phase + 1);
    return done > 0;
}

static void sleep_on(tm_pool *pool, uint32_t seen, int is_waiter)
{
    atomic_fetch_add(&pool->waiters, (uint32_t)is_waiter);
    atomic_fetch_add(&pool->sleepers, 1);
    tm_futex_wait(&pool->epoch, seen);
    uint32_t still = atomic_fetch_sub(&pool->sleepers, 1) - 1;
    atomic_fetch_sub(&pool->waiters, (uint32_t)is_waiter);
    /* Who is woken wakes two more: the caller pays for one wake only. */
    if (still && !is_waiter)
        tm_futex_wake(&pool->epoch, 2);
}

/* Until the epoch moves on: spin, then spin and yield the core, then sleep. */
static void idle(tm_pool *pool, uint32_t seen, int is_waiter)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen)
            return;
        tm_relax();
    }
    for (int64_t until = tm_now_ns() + pool->hot_ns; tm_now_ns() < until;) {
        if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen)
            return;
        sched_yield();
    }
    sleep_on(pool, seen, is_waiter);
}

typedef struct {
    tm_pool *pool;
    int worker;
} helper_start;

static void *helper(void *arg)
{
    helper_start start = *(helper_start *)arg;
    free(arg);
    while (!atomic_load(&start.pool->stop)) {
        uint32_t seen = atomic_load(&start.pool->epoch);
        if (!work(start.pool, start.worker, NULL) && !atomic_load(&start.pool->stop))
            idle(start.pool, seen, 0);
    }
    return NULL;
}

/* Start helpers with all signals blocked (they are for the caller's threads). As many as the system gives. */
static void start_helpers(tm_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pool->helpers = 0; pool->helpers < pool->threads - 1; pool->helpers++) {
        helper_start *start = malloc(sizeof *start);
        if (!start)
            break;
        *start = (helper_start){pool, pool->helpers + 1};
        if (pthread_create(&pool->threads_of[pool->helpers], NULL, helper, start)) {
            free(start);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* After fork the child has no helpers and perhaps a lock that nobody will open: start over, empty. What was in
 * flight is the parent's to finish; here it counts as done, so that nobody waits for it. */
static void reset_after_fork(tm_pool *pool)
{
    pthread_mutex_init(&pool->lock, NULL);
    if (pool->task)
        atomic_store(&pool->task->done, 1);
    for (tm_task *task = pool->first; task; task = task->next)
        atomic_store(&task->done, 1);
    pool->first = pool->last = pool->task = NULL;
    pool->busy = 0;
    for (int i = 0; i < pool->threads; i++)
        atomic_store(&pool->lanes[i].range, 0);
    atomic_store(&pool->left, 0);
    atomic_store(&pool->caller, 0);
    atomic_store(&pool->sleepers, 0);
    atomic_store(&pool->waiters, 0);
    pool->helpers = 0;
    atomic_store(&pool->forked, 1);
}

static void before_fork(void) { pthread_mutex_lock(&pools_lock); }
static void after_fork_parent(void) { pthread_mutex_unlock(&pools_lock); }
static void after_fork_child(void)
{
    pthread_mutex_init(&pools_lock, NULL);
    for (tm_pool *pool = pools; pool; pool = pool->next_pool)
        reset_after_fork(pool);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

tm_pool *tm_pool_new(int threads, long hot_us)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads < 1 || threads > 4096 || hot_us < 0) {
        errno = EINVAL;
        return NULL;
    }
    size_t bytes = sizeof(tm_pool) + (size_t)threads * sizeof(lane);
    tm_pool *pool = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    pthread_t *threads_of = calloc((size_t)threads, sizeof *threads_of);
    if (!pool || !threads_of) {
        free(pool);
        free(threads_of);
        return NULL;
    }
    memset(pool, 0, bytes);
    pool->threads = threads;
    pool->hot_ns = (int64_t)hot_us * 1000;
    pool->threads_of = threads_of;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pools_lock);
    pool->next_pool = pools;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
    start_helpers(pool);
    return pool;
}

static void unlist(tm_pool *pool)
{
    pthread_mutex_lock(&pools_lock);
    tm_pool **at = &pools;
    while (*at != pool)
        at = &(*at)->next_pool;
    *at = pool->next_pool;
    pthread_mutex_unlock(&pools_lock);
}

void tm_pool_free(tm_pool *pool)
{
    unlist(pool);
    atomic_store(&pool->stop, 1);
    atomic_fetch_add(&pool->epoch, 1);
    tm_futex_wake(&pool->epoch, INT_MAX);
    for (int i = 0; i < pool->helpers; i++)
        pthread_join(pool->threads_of[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads_of);
    free(pool);
}

int tm_pool_threads(const tm_pool *pool) { return pool->threads; }
int tm_pool_helpers(const tm_pool *pool) { return pool->helpers; }

void tm_pool_submit(tm_pool *pool, tm_task *task)
{
    if (atomic_exchange(&pool->forked, 0))
        start_helpers(pool);
    atomic_store_explicit(&task->done, 0, memory_order_relaxed);
    task->next = NULL;
    pthread_mutex_lock(&pool->lock);
    int first = !pool->busy;
    if (first)
        pool->busy = 1;
    else if (pool->first)
        pool->last = pool->last->next = task;
    else
        pool->first = pool->last = task;
    pthread_mutex_unlock(&pool->lock);
    if (first)
        go_on(pool, task, 0);
}

void tm_pool_wait(tm_pool *pool, tm_task *task)
{
    while (!is_done(task)) {
        uint32_t seen = atomic_load(&pool->epoch);
        if (!atomic_exchange_explicit(&pool->caller, 1, memory_order_acquire)) {
            while (!is_done(task) && work(pool, 0, task))
                ;
            atomic_store(&pool->caller, 0);
            /* Another waiter may have been turned away while units for it were open: nobody else would tell it. */
            if (is_done(task) && atomic_load(&pool->left) > 0)
                wake(pool, 1);
        }
        if (!is_done(task))
            idle(pool, seen, 1);
    }
}
