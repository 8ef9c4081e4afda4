/* Stands before the compiler's own immintrin.h in an emulated build: AVX-512 instructions become SIMDe's C functions
 * (headers of the PyPI package cmeel-simde), so that the AVX-512 kernels run on processors without it. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

/* What SIMDe 0.8.2 lacks, by the definition of each instruction. */
#define _mm512_cvtepi8_epi32(a) emulated_widen(a, 1)
#define _mm512_cvtepu8_epi32(a) emulated_widen(a, 0)
static inline simde__m512i emulated_widen(__m128i a, int is_signed)
{
    unsigned char bytes[16];
    int wide[16];
    __builtin_memcpy(bytes, &a, 16);
    for (int i = 0; i < 16; i++)
        wide[i] = is_signed ? (signed char)bytes[i] : bytes[i];
    return simde_mm512_loadu_si512(wide);
}

#define _mm512_permute_ps(a, imm) emulated_permute(a, imm)
static inline simde__m512 emulated_permute(simde__m512 a, int imm)
{
    float in[16], out[16];
    simde_mm512_storeu_ps(in, a);
    for (int i = 0; i < 16; i++)
        out[i] = in[i / 4 * 4 + (imm >> i % 4 * 2 & 3)];
    return simde_mm512_loadu_ps(out);
}

#define _mm512_reduce_add_ps(a) emulated_sum(a)
static inline float emulated_sum(simde__m512 a)
{
    float in[16], sum = 0;
    simde_mm512_storeu_ps(in, a);
    for (int i = 0; i < 16; i++)
        sum += in[i];
    return sum;
}

#endif
