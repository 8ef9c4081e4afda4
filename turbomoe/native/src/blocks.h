/* How output rows are cut into the units that workers take. */
#ifndef TM_BLOCKS_H
#define TM_BLOCKS_H

/* Units of 8 rows let the last of them spread over all workers; the kernels for many tokens want 32 at a time.
 * Neighbouring units that are taken together are computed as one block of at most TM_BLOCK_ROWS. */
enum { TM_BLOCK_ROWS = 32, TM_UNIT_FEW = 8 };

static inline int tm_unit_rows(int many) { return many ? TM_BLOCK_ROWS : TM_UNIT_FEW; }
static inline long tm_unit_grain(int unit_rows) { return TM_BLOCK_ROWS / unit_rows; }
static inline long tm_units(long rows, int unit_rows) { return (rows + unit_rows - 1) / unit_rows; }

#endif
