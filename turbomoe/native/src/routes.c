/* See routes.h: a counting sort, stable, so that pairs of one expert stay in row order. */
#include "routes.h"

#include <stddef.h>

#include "formats.h"

long tm_routes_bytes(int experts, long pairs)
{
    return (long)sizeof(tm_slot) * pairs + (long)sizeof(long) * (2 * pairs + experts);
}

void tm_routes_init(tm_routes *routes, int experts, long pairs, void *memory)
{
    routes->slot = memory;
    routes->place = (long *)(void *)(routes->slot + pairs);
    routes->row = routes->place + pairs;
    routes->slot_of_expert = routes->row + pairs;
    for (int e = 0; e < experts; e++)
        routes->slot_of_expert[e] = -1;
}

/* Give every routed expert a slot and count its pairs. */
static int count_pairs(tm_routes *r, const int64_t *ids, long n, int experts, const void *const *blobs)
{
    for (long i = 0; i < n; i++) {
        if (ids[i] < 0)
            continue;
        if (ids[i] >= experts || !blobs[ids[i]])
            return -1;
        long *slot = &r->slot_of_expert[ids[i]];
        if (*slot < 0) {
            *slot = r->slots++;
            r->slot[*slot] = (tm_slot){(int)ids[i], 0, 0};
        }
        r->slot[*slot].count++;
        r->pairs++;
    }
    return 0;
}

/* Leave the scratch as it was found: all -1. */
static void forget_slots(tm_routes *r)
{
    for (long s = 0; s < r->slots; s++)
        r->slot_of_expert[r->slot[s].expert] = -1;
}

static void place_pairs(tm_routes *r, const int64_t *ids, long n, long top)
{
    for (long s = 0, first = 0; s < r->slots; s++) {
        r->slot[s].first = first;
        first += r->slot[s].count;
        r->slot[s].count = 0;
    }
    for (long i = 0; i < n; i++) {
        r->place[i] = -1;
        if (ids[i] < 0)
            continue;
        tm_slot *slot = &r->slot[r->slot_of_expert[ids[i]]];
        r->place[i] = slot->first + slot->count++;
        r->row[r->place[i]] = i / top;
    }
}

int tm_routes_sort(tm_routes *r, const int64_t *ids, long rows, long top, int experts, const void *const *blobs)
{
    r->slots = r->pairs = 0;
    int status = count_pairs(r, ids, rows * top, experts, blobs);
    if (!status)
        place_pairs(r, ids, rows * top, top);
    forget_slots(r);
    return status;
}
