/* The kernels at level avx2. */
#include "level.h"

#include <math.h>
#include <string.h>

#include "simd_avx2.h"

#include "kernels.h"
#include "kernels_panel.h"
#include "kernels_dot.h"
#include "kernels_float.h"
#include "rounding_x86.h"
#include "kernels_vector.h"
#include "kernels_decode.h"
#include "kernels_trellis.h"

const tm_level tm_level_avx2 = {
    .name = "avx2",
    .dot = {dot_TM_Q4_0, dot_TM_Q4_1, dot_TM_Q5_0, dot_TM_Q5_1, dot_TM_Q8_0, dot_TM_IQ4_NL, dot_TM_MXFP4,
            dot_TM_Q4_K, dot_TM_Q5_K, dot_TM_Q6_K, dot_TM_F16, dot_TM_BF16, dot_TM_F32},
    .dot_many = {many_TM_Q4_0, many_TM_Q4_1, many_TM_Q5_0, many_TM_Q5_1, many_TM_Q8_0, many_TM_IQ4_NL, many_TM_MXFP4,
                 many_TM_Q4_K, many_TM_Q5_K, many_TM_Q6_K, dot_TM_F16, dot_TM_BF16, dot_TM_F32},
    .quantise = quantise,
    .gate = gate,
    .norm = norm,
    .attend = attend,
    .trellis = encode_trellis,
    .widen = widen_floats,
    .narrow = narrow_floats,
    .read = read_memory,
};
