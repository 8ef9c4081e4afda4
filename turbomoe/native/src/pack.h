/* GGUF blocks in, planes out. */
#ifndef TM_PACK_H
#define TM_PACK_H

#include "formats.h"

/* Pack rows [row, row + n) of GGUF blocks at `raw` (the first byte of row 0) into the planes of `m`, which are
 * written through. Returns the first row with a scale that is no finite number (rows before it are packed), else -1. */
long tm_pack_rows(const tm_matrix *m, const void *raw, long row, long n);

#endif
