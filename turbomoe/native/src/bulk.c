/* See bulk.h. */
#include "bulk.h"

#include <limits.h>
#include <stdatomic.h>

#include "errors.h"
#include "level.h"
#include "pack.h"

typedef struct {
    tm_task task;
    tm_matrix matrix;
    const void *raw;
    _Atomic long bad_row;
} pack_task;

static void pack_units(tm_task *task, int phase, long begin, long end, int worker)
{
    (void)phase;
    (void)worker;
    pack_task *p = (pack_task *)task;
    long bad = tm_pack_rows(&p->matrix, p->raw, begin, end - begin);
    long seen = atomic_load(&p->bad_row);
    while (bad >= 0 && bad < seen && !atomic_compare_exchange_weak(&p->bad_row, &seen, bad))
        ;
}

long tm_pack(tm_pool *pool, int format, int rows, int cols, const void *raw, void *blob)
{
    pack_task p = {.task = {.run = pack_units, .units = {rows}, .grain = {64}, .phases = 1}, .raw = raw};
    atomic_init(&p.bad_row, LONG_MAX);
    if (!tm_matrix_view(&p.matrix, format, rows, cols, blob))
        return TM_ERR_SHAPE;
    tm_pool_submit(pool, &p.task);
    tm_pool_wait(pool, &p.task);
    long bad = atomic_load(&p.bad_row);
    return bad == LONG_MAX ? TM_OK : bad + 1;
}

enum { READ_UNIT = 1 << 16 };

typedef struct {
    tm_task task;
    const char *from;
    size_t bytes;
    _Atomic unsigned long long sum;
} read_task;

static void read_units(tm_task *task, int phase, long begin, long end, int worker)
{
    (void)phase;
    (void)worker;
    read_task *r = (read_task *)task;
    size_t at = (size_t)begin * READ_UNIT, to = (size_t)end * READ_UNIT;
    atomic_fetch_add(&r->sum, tm_level_now()->read(r->from + at, (to < r->bytes ? to : r->bytes) - at));
}

unsigned long long tm_read(tm_pool *pool, const void *from, size_t bytes)
{
    read_task r = {.task = {.run = read_units, .grain = {16}, .phases = 1}, .from = from, .bytes = bytes};
    r.task.units[0] = (long)((bytes + READ_UNIT - 1) / READ_UNIT);
    tm_pool_submit(pool, &r.task);
    tm_pool_wait(pool, &r.task);
    return atomic_load(&r.sum);
}
