/* The memory of a work: one block, carved once. */
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "experts_work.h"

typedef struct {
    char *base;                /* NULL to count bytes only */
    long used;
} arena;

static void *carve(arena *a, long bytes)
{
    void *here = a->base ? a->base + a->used : NULL;
    a->used += tm_round_up(bytes, TM_ALIGN);
    return here;
}

static void place(tm_experts_work *w, arena *a)
{
    const tm_experts_room *room = &w->room;
    int pairs = room->rows * room->top;
    long groups = (room->width + TM_GROUP - 1) / TM_GROUP, threads = tm_pool_threads(w->pool);
    w->x_of = carve(a, (long)sizeof(void *) * pairs);
    w->h_of = carve(a, (long)sizeof(void *) * pairs);
    w->missing = carve(a, (long)sizeof(int) * pairs * groups);
    w->scratch = carve(a, (long)sizeof(float) * threads * pairs * TM_BLOCK_ROWS);
    w->x_memory = carve(a, tm_inputs_bytes(room->hidden, room->rows));
    w->h_memory = carve(a, tm_inputs_bytes(room->width, pairs));
    void *routes = carve(a, tm_routes_bytes(room->experts, pairs));
    if (routes)
        tm_routes_init(&w->routes, room->experts, pairs, routes);
}

static int in_range(const tm_experts_room *room)
{
    const int most = 1 << 24;
    return room->hidden >= 1 && room->hidden <= most && room->width >= 1 && room->width <= most && room->experts >= 1
           && room->experts <= most && room->rows >= 1 && room->top >= 1 && room->rows <= most / room->top;
}

tm_experts_work *tm_experts_work_new(tm_pool *pool, const tm_experts_room *room)
{
    tm_experts_work *w = in_range(room) ? calloc(1, sizeof *w) : NULL;
    if (!w)
        return NULL;
    w->task.run = tm_experts_work_units, w->task.phases = 3;
    w->pool = pool, w->room = *room;
    atomic_init(&w->task.done, 1);
    arena a = {NULL, 0};
    place(w, &a);
    a = (arena){aligned_alloc(TM_ALIGN, (size_t)a.used), 0};
    if (!a.base) {
        free(w);
        return NULL;
    }
    w->memory = a.base;
    place(w, &a);
    return w;
}

void tm_experts_work_free(tm_experts_work *w)
{
    if (!w)
        return;
    tm_pool_wait(w->pool, &w->task);
    free(w->memory);
    free(w);
}
