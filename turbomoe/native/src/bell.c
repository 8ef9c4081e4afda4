/* See bell.h. */
#define _GNU_SOURCE
#include "bell.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "errors.h"
#include "relax.h"

enum { NAP_NS = 50000, SPINS = 256 };

struct tm_bell_server {
    tm_bell *bell;
    const tm_errand *errands;
    uint32_t count;
    int64_t hot_ns;
    _Atomic int stop;
    pthread_t thread;
};

static void answer(tm_bell_server *s, uint32_t ring)
{
    uint32_t errand = s->bell->errand;
    s->bell->status = TM_ERR_ERRAND;
    if (errand < s->count) {
        s->errands[errand].run(s->errands[errand].call);
        s->bell->status = *s->errands[errand].status;
    }
    atomic_store_explicit(&s->bell->answer, ring, memory_order_release);
}

static void *serve(void *arg)
{
    tm_bell_server *s = arg;
    uint32_t last = atomic_load(&s->bell->answer);
    int64_t quiet_since = tm_now_ns();
    for (long spins = 0; !atomic_load_explicit(&s->stop, memory_order_relaxed); spins++) {
        uint32_t ring = atomic_load_explicit(&s->bell->ring, memory_order_acquire);
        if (ring != last) {
            answer(s, last = ring);
            quiet_since = tm_now_ns();
        }
        tm_relax();
        if (spins % SPINS == 0 && tm_now_ns() - quiet_since > s->hot_ns)
            nanosleep(&(struct timespec){0, NAP_NS}, NULL);
    }
    return NULL;
}

tm_bell_server *tm_bell_start(tm_bell *bell, const tm_errand *errands, uint32_t count, long hot_us)
{
    tm_bell_server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->bell = bell, s->errands = errands, s->count = count;
    s->hot_ns = (int64_t)hot_us * 1000;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&s->thread, NULL, serve, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed)
        return s;
    free(s);
    return NULL;
}

void tm_bell_stop(tm_bell_server *server)
{
    atomic_store(&server->stop, 1);
    pthread_join(server->thread, NULL);
    free(server);
}
