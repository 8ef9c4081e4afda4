/* Questions about the library itself; with experts.h, linear.h, decoder.h, trellis.h, bell.h, bulk.h, pool.h and tm_level_force the whole
 * interface. */
#ifndef TM_ABI_H
#define TM_ABI_H

#include <stddef.h>

enum { TM_ABI_VERSION = 5 };

int tm_abi_version(void);
/* sizeof a struct, in the order tm_experts, tm_experts_room, tm_experts_call, tm_linear, tm_linear_call, tm_bell,
 * tm_errand, tm_decoder_layer, tm_decoder_call, tm_trellis. */
size_t tm_abi_size(int which);
/* A hash of the sources that this was built from. */
const char *tm_build_id(void);
/* The dispatch level in use. */
const char *tm_level_name(void);
/* Bytes of a packed matrix; 0 if there is no such matrix. */
size_t tm_packed_bytes(int format, int rows, int cols);

#endif
