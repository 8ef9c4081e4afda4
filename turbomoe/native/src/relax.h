/* Waiting politely, and the clock. */
#ifndef TM_RELAX_H
#define TM_RELAX_H

#include <stdint.h>
#include <time.h>

static inline void tm_relax(void)
{
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

static inline int64_t tm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#endif
