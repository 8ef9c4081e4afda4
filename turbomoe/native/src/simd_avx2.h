/* Vector primitives, AVX2 + FMA + F16C: 8 lanes. kernels.h tells what each must do. */
#include <immintrin.h>
#include <string.h>

#define LANES 8
#define TILE 4
#define PANEL_TILE 3
typedef __m256 vf;
typedef __m256i vi, vb;

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_int(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE float vf_sum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

INLINE vf vf_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf vf_bf16(const uint8_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf vf_u8(const uint8_t *p) { return vf_int(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
INLINE vf vf_i8(const uint8_t *p) { return vf_int(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
INLINE vf vf_e8m0(const uint8_t *p)
{
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 23));
}

INLINE vf vf_quad(const float *p) { return _mm256_broadcast_ps((const __m128 *)(const void *)p); }
INLINE vf fours(vf a) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8)); }
/* The lanes of both with even numbers, and with odd ones. */
INLINE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    *even = fours(_mm256_shuffle_ps(a, b, 0x88));
    *odd = fours(_mm256_shuffle_ps(a, b, 0xdd));
}

/* table[index[i]], 16 entries. */
INLINE vf vf_levels(const float *table, const uint8_t *index)
{
    __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)index));
    vf low = _mm256_permutevar8x32_ps(vf_load(table), i), high = _mm256_permutevar8x32_ps(vf_load(table + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

/* One superblock covers a step of 8 groups. */
INLINE vf vf_super(const uint8_t *p)
{
    uint16_t half;
    memcpy(&half, p, 2);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}
INLINE void vf_super_pair(const uint8_t *p, vf *scale, vf *less)
{
    __m128 pair = _mm_cvtph_ps(_mm_loadu_si32(p));
    *scale = _mm256_broadcastss_ps(pair);
    *less = _mm256_broadcastss_ps(_mm_movehdup_ps(pair));
}

/* The order in which vb_transpose4 leaves groups. */
INLINE vf vf_order(vf p) { return _mm256_permutevar8x32_ps(p, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }

INLINE vb vb_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vb vb_zero(void) { return _mm256_setzero_si256(); }
INLINE vb vb_or(vb a, vb b) { return _mm256_or_si256(a, b); }
INLINE vb vb_low(vb a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE vb vb_high(vb a) { return vb_low(_mm256_srli_epi16(a, 4)); }
INLINE vb vb_table(const int8_t *table, vb index)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}

/* Bits `shift`, `shift + 1`... of every byte, masked by `mask` << 4 and moved to bit 4. */
INLINE vb bits_to_4(vb a, int shift, int mask)
{
    vb moved = shift < 4 ? _mm256_slli_epi16(a, 4 - shift) : _mm256_srli_epi16(a, shift - 4);
    return _mm256_and_si256(moved, _mm256_set1_epi8((char)(mask << 4)));
}
INLINE void vb_high1(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    vb bits = vb_load(row + g / 8 * 32);
    *lo = bits_to_4(bits, 2 * b, 1);
    *hi = bits_to_4(bits, 2 * b + 1, 1);
}
INLINE void vb_high2(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    vb bits = vb_load(row + g / 8 * 64 + b % 2 * 32);
    *lo = bits_to_4(bits, b / 2 * 4, 3);
    *hi = bits_to_4(bits, b / 2 * 4 + 2, 3);
}

INLINE vi widen(vi pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

/* Signed codes: |w| times x with the sign of w. 128 * 127 * 2 still fits 16 bits, but only one pair does. */
#define SIGNED_ZERO 0
INLINE vb vb_signed(vb w) { return w; }
INLINE vi vi_dot_signed(vb w, vb x)
{
    return widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}

/* Turn 4 rows of 4 dwords into 4 columns, within each 128-bit lane. */
INLINE void vb_transpose4(vb *r)
{
    vb a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    vb c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm256_unpacklo_epi64(a, c);
    r[1] = _mm256_unpackhi_epi64(a, c);
    r[2] = _mm256_unpacklo_epi64(b, d);
    r[3] = _mm256_unpackhi_epi64(b, d);
}

/* Turn 8 rows of 8 dwords into 8 columns. */
INLINE void vb_transpose(vb *r)
{
    vb pair[8], quad[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
        quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
        quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
}
INLINE void vf_transpose(vf *r)
{
    vb bits[8];
    UNROLL for (int i = 0; i < 8; i++)
        bits[i] = _mm256_castps_si256(r[i]);
    vb_transpose(bits);
    UNROLL for (int i = 0; i < 8; i++)
        r[i] = _mm256_castsi256_ps(bits[i]);
}

/* Sums of products of interleaved codes with four values of a token, `four`. Unsigned ones stay in 16-bit pairs,
 * which hold as many as kernels_panel.h says. */
#define VA_SIGNED_SPAN 8
typedef __m256i va;
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE va va_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vb vb_four(const int8_t *x)
{
    int32_t dword;
    memcpy(&dword, x, sizeof dword);
    return _mm256_set1_epi32(dword);
}
INLINE va va_add(va sum, vb w, vb four, const int is_signed)
{
    return is_signed ? vi_add(sum, vi_dot_signed(w, four)) : _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, four));
}
INLINE vi vi_part(va sum, const int is_signed) { return is_signed ? sum : widen(sum); }
