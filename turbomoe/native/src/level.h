/* A dispatch level: the same kernels, compiled for one instruction set. */
#ifndef TM_LEVEL_H
#define TM_LEVEL_H

#include "activation.h"
#include "attend.h"
#include "formats.h"
#include "trellis.h"

#define INLINE static inline __attribute__((always_inline))
#if defined UNROLL /* given: test builds that must compile fast */
#elif defined __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

enum { TM_TYPE_F32, TM_TYPE_BF16, TM_TYPE_F16, TM_TYPES };
enum { TM_SILU, TM_GELU_TANH, TM_SWIGLU_CLIPPED, TM_GATES };

/* out[t * stride + i] = row (first + i) of `m` . activation t, for i in [0, n) and t in [0, tokens).
 * x[t] is a quantised row (tm_act), or floats for float weights. */
typedef void tm_dot(const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out, long stride);

typedef struct {
    const char *name;
    /* Bit-equal for a token and a row, whatever comes with them. */
    tm_dot *dot[TM_FORMATS];
    /* Faster for 5 tokens and more, in another order of summation: the last bits of a token's result depend on how
     * many tokens there are. */
    tm_dot *dot_many[TM_FORMATS];
    /* Quantise groups [g, g + n) of `x` (32 floats a group) into `to`. NaN and infinity make the whole group NaN. */
    void (*quantise)(const float *x, tm_act to, long g, long n);
    /* gate[i] = act(gate[i]) * up[i]; alpha and limit are for TM_SWIGLU_CLIPPED. */
    void (*gate)(int kind, float *gate, const float *up, long n, float alpha, float limit);
    /* Root-mean-square norm of x [n], times weight. */
    void (*norm)(const float *x, const float *weight, float *out, long n, float eps);
    /* Keys [begin, end) that a token sees of `head` into the softmaxes of that head's queries. */
    void (*attend)(const tm_attend *a, long head, long begin, long end, tm_softmax *states);
    /* Encode vectors [begin, end). */
    void (*trellis)(const tm_trellis *job, long begin, long end);
    /* Between floats and a TM_TYPE. */
    void (*widen)(int type, const void *from, float *to, long n);
    void (*narrow)(int type, const float *from, void *to, long n);
    /* Sum of the 64-bit words of memory: reads and does next to nothing else. `bytes` is a multiple of 64. */
    unsigned long long (*read)(const void *from, size_t bytes);
} tm_level;

extern const tm_level tm_level_portable, tm_level_avx2, tm_level_avx512;

/* The level in use: the best that this processor has, unless one was forced. */
const tm_level *tm_level_now(void);
/* Force a level by name ("portable", "avx2", "avx512"), or choose again ("auto"). 0, or -1 if it cannot run here. */
int tm_level_force(const char *name);

#endif
