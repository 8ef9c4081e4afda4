/* Vector primitives, AVX-512 F/BW/VL/DQ + VNNI: 16 lanes. kernels.h tells what each must do. */
#include <immintrin.h>
#include <string.h>

#define LANES 16
#define TILE 4
#define PANEL_TILE 6
typedef __m512 vf;
typedef __m512i vi, vb;

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }

INLINE vf vf_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf vf_bf16(const uint8_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf vf_u8(const uint8_t *p) { return vf_int(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE vf vf_i8(const uint8_t *p) { return vf_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE vf vf_e8m0(const uint8_t *p)
{
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 23));
}

INLINE vf vf_quad(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
/* The lanes of both with even numbers, and with odd ones. */
INLINE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(a, at, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
}

/* table[index[i]], 16 entries. */
INLINE vf vf_levels(const float *table, const uint8_t *index)
{
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)index)), vf_load(table));
}

/* Two superblocks cover a step of 16 groups. */
INLINE vf half_each(__m128 of, int first, int second)
{
    const __m512i which = _mm512_inserti64x4(_mm512_set1_epi32(first), _mm256_set1_epi32(second), 1);
    return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(of));
}
INLINE vf vf_super(const uint8_t *p) { return half_each(_mm_cvtph_ps(_mm_loadu_si32(p)), 0, 1); }
INLINE void vf_super_pair(const uint8_t *p, vf *scale, vf *less)
{
    __m128 four = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(const void *)p));
    *scale = half_each(four, 0, 2);
    *less = half_each(four, 1, 3);
}

/* The order in which vb_transpose4 leaves groups. */
INLINE vf vf_order(vf p)
{
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), p);
}

INLINE vb vb_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vb vb_zero(void) { return _mm512_setzero_si512(); }
INLINE vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
INLINE vb vb_low(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vb vb_high(vb a) { return vb_low(_mm512_srli_epi16(a, 4)); }

INLINE vb vb_table(const int8_t *table, vb index)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), index);
}

/* Four groups of a step are half of a 32-byte line: its 32 bytes serve both halves of the vector, at two bits. */
INLINE vb bit_to_4(vb bits, int low_half, int high_half)
{
    const __m512i at = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << low_half)),
                                          _mm256_set1_epi8((char)(1 << high_half)), 1);
    return _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(bits, at), 16);
}
INLINE void vb_high1(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    vb bits = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(row + g / 8 * 32 + b / 2 * 32)));
    int at = b % 2 * 4;
    *lo = bit_to_4(bits, at, at + 2);
    *hi = bit_to_4(bits, at + 1, at + 3);
}
INLINE vb bits_to_4(vb a, int shift)
{
    vb moved = shift < 4 ? _mm512_slli_epi16(a, (unsigned)(4 - shift)) : _mm512_srli_epi16(a, (unsigned)(shift - 4));
    return _mm512_and_si512(moved, _mm512_set1_epi8(0x30));
}
INLINE void vb_high2(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    vb bits = vb_load(row + g / 8 * 64 + b / 2 * 64);
    *lo = bits_to_4(bits, b % 2 * 4);
    *hi = bits_to_4(bits, b % 2 * 4 + 2);
}


/* Signed codes are moved up by 128; the kernel takes 128 times the sum of the activations away. */
#define SIGNED_ZERO 128
INLINE vb vb_signed(vb w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }

/* Turn 4 rows of 4 dwords into 4 columns, within each 128-bit lane. */
INLINE void vb_transpose4(vb *r)
{
    vb a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    vb c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(a, c);
    r[1] = _mm512_unpackhi_epi64(a, c);
    r[2] = _mm512_unpacklo_epi64(b, d);
    r[3] = _mm512_unpackhi_epi64(b, d);
}

/* Turn 16 rows of 16 dwords into 16 columns: within 128-bit lanes first, then the lanes. */
INLINE void vb_transpose(vb *r)
{
    vb pair[16], quad[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        vb even = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88), odd = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xdd);
        vb even2 = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0x88);
        vb odd2 = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}
INLINE void vf_transpose(vf *r)
{
    vb bits[16];
    UNROLL for (int i = 0; i < 16; i++)
        bits[i] = _mm512_castps_si512(r[i]);
    vb_transpose(bits);
    UNROLL for (int i = 0; i < 16; i++)
        r[i] = _mm512_castsi512_ps(bits[i]);
}

/* Sums of products of interleaved codes with four values of a token, `four`. */
#define VA_SIGNED_SPAN 8
typedef __m512i va;
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE va va_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vb vb_four(const int8_t *x)
{
    int32_t dword;
    memcpy(&dword, x, sizeof dword);
    return _mm512_set1_epi32(dword);
}
INLINE va va_add(va sum, vb w, vb four, const int is_signed)
{
    (void)is_signed;
    return _mm512_dpbusd_epi32(sum, w, four);
}
INLINE vi vi_part(va sum, const int is_signed)
{
    (void)is_signed;
    return sum;
}
