/* Sorting routed pairs by expert: the part of routing that the core does itself. */
#ifndef TM_ROUTES_H
#define TM_ROUTES_H

#include <stdint.h>

/* The pairs of one expert: [first, first + count) in sorted order. */
typedef struct {
    int expert;
    long first, count;
} tm_slot;

typedef struct {
    long slots, pairs;         /* experts that were routed to; pairs that count */
    tm_slot *slot;             /* [slots], in order of first appearance */
    long *place;               /* [rows * top]: where a pair is in sorted order; -1 for a negative id */
    long *row;                 /* [pairs]: the row of a sorted pair */
    long *slot_of_expert;      /* [experts], scratch */
} tm_routes;

long tm_routes_bytes(int experts, long pairs);
void tm_routes_init(tm_routes *routes, int experts, long pairs, void *memory);

/* Sort `rows` x `top` ids. Returns 0, or -1 for an id that is not below `experts` or whose blob is NULL. */
int tm_routes_sort(tm_routes *routes, const int64_t *ids, long rows, long top, int experts, const void *const *blobs);

#endif
