/* What a foreign caller asks first: does its picture of the structs match? */
#include "abi.h"

#include <stddef.h>

#include "bell.h"
#include "decoder.h"
#include "experts.h"
#include "level.h"
#include "linear.h"
#include "trellis.h"

int tm_abi_version(void) { return TM_ABI_VERSION; }

size_t tm_abi_size(int which)
{
    static const size_t sizes[] = {sizeof(tm_experts), sizeof(tm_experts_room), sizeof(tm_experts_call),
                                   sizeof(tm_linear), sizeof(tm_linear_call), sizeof(tm_bell), sizeof(tm_errand),
                                   sizeof(tm_decoder_layer), sizeof(tm_decoder_call), sizeof(tm_trellis)};
    return which >= 0 && (size_t)which < sizeof sizes / sizeof *sizes ? sizes[which] : 0;
}

#ifndef TM_BUILD_ID
#define TM_BUILD_ID "unknown"
#endif
const char *tm_build_id(void) { return TM_BUILD_ID; }

const char *tm_level_name(void) { return tm_level_now()->name; }

size_t tm_packed_bytes(int format, int rows, int cols)
{
    tm_matrix m;
    return tm_matrix_view(&m, format, rows, cols, NULL);
}
