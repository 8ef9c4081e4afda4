/* Which instruction set runs: detected once, or forced for tests and benchmarks. */
#include "level.h"

#include <stdatomic.h>
#include <string.h>

static int always(void) { return 1; }

#ifdef __x86_64__
static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void)
{
#ifdef TM_EMULATED_AVX512 /* a test build: tests/native/emulated */
    return 1;
#endif
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
           && __builtin_cpu_supports("avx512vnni");
}
#endif

static const struct {
    const tm_level *level;
    int (*runs)(void);
} levels[] = {
#ifdef __x86_64__
    {&tm_level_avx512, has_avx512},
    {&tm_level_avx2, has_avx2},
#endif
    {&tm_level_portable, always},
};
enum { LEVELS = sizeof levels / sizeof *levels };

static _Atomic(const tm_level *) chosen;

int tm_level_force(const char *name)
{
    for (int i = 0; i < LEVELS; i++) {
        if (strcmp(name, "auto") && strcmp(name, levels[i].level->name))
            continue;
        if (!levels[i].runs())
            continue;
        atomic_store(&chosen, levels[i].level);
        return 0;
    }
    return -1;
}

const tm_level *tm_level_now(void)
{
    const tm_level *level = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (level)
        return level;
    tm_level_force("auto");
    return atomic_load(&chosen);
}
