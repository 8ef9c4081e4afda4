/* Encoding vectors by trellis: turbomoe/kv/codecs/trellis.py says what is computed, trellis_search.py how. */
#ifndef TM_TRELLIS_H
#define TM_TRELLIS_H

#include <stdint.h>

#include "errors.h"
#include "pool.h"

enum { TM_TCQ2, TM_TCQ2_5, TM_TCQ3, TM_TCQ4, TM_TRELLISES };
enum { TM_TRELLIS_DIM = 512, TM_TRELLIS_STATES = 1024, TM_TRELLIS_GROUPS = 128 };

/* Vectors to encode. `dim` is a power of two, 32..512. */
typedef struct {
    int kind, dim;
    const float *x;            /* [count][dim] */
    const float *codebook;     /* [values][states] */
    const float *by_dropped;   /* the same as [values][dropped bits][groups] */
    uint8_t *codes;            /* [count][bytes of a vector] */
    uint16_t *scales;          /* [count], fp16 */
} tm_trellis;

/* Encode `count` vectors, by all workers of `pool`, or by the caller alone if it is NULL. TM_OK or TM_ERR_SHAPE. */
int tm_trellis_encode(tm_pool *pool, const tm_trellis *job, long count);

#endif
