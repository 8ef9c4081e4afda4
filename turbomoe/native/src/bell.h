/* Starting work by raising a flag in memory, as a kernel on a GPU can, and answering in memory.
 *
 * The device writes `errand`, makes it visible, then sets `ring` to a new number (any that differs from the last).
 * When the work is done `answer` becomes that number. A device waits by spinning on `answer`.
 */
#ifndef TM_BELL_H
#define TM_BELL_H

#include <stdatomic.h>
#include <stdint.h>

/* Shared with the device: pinned host memory, zeroed. Each flag has a cache line of its own. */
typedef struct {
    _Alignas(64) _Atomic uint32_t ring;
    uint32_t errand;
    _Alignas(64) _Atomic uint32_t answer;
    int32_t status;                /* of the last errand: TM_OK, or why it was not run */
} tm_bell;

typedef struct {
    void (*run)(void *call);       /* tm_experts_run or tm_linear_run */
    void *call;
    const int *status;             /* where run leaves its status */
} tm_errand;

typedef struct tm_bell_server tm_bell_server;

/* A thread that answers the bell. It polls without pause for `hot_us` after the last ring, then every 50 us. Bell and
 * errands stay the caller's and must outlive the server. NULL if the thread cannot be had. */
tm_bell_server *tm_bell_start(tm_bell *bell, const tm_errand *errands, uint32_t count, long hot_us);
/* Returns when an errand that is under way has been answered. */
void tm_bell_stop(tm_bell_server *server);

#endif
