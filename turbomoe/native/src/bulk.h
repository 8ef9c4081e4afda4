/* Work over much memory at once: packing a matrix, and reading memory to learn how fast it can be read. */
#ifndef TM_BULK_H
#define TM_BULK_H

#include <stddef.h>

#include "pool.h"

/* Pack a matrix of GGUF blocks at `raw` into `blob`. Returns TM_OK, TM_ERR_SHAPE, or 1 + the first row that holds a
 * scale which is no finite number. */
long tm_pack(tm_pool *pool, int format, int rows, int cols, const void *raw, void *blob);

/* Read `bytes` from `from` (64-byte aligned) once, all workers together, and return a sum of what was read. */
unsigned long long tm_read(tm_pool *pool, const void *from, size_t bytes);

#endif
