/* Vector primitives in GCC/Clang vector extensions only: 4 lanes, any processor. kernels.h tells what each must do. */
#include <string.h>

#define LANES 4
#define TILE 2
#define PANEL_TILE 3
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int16_t vs __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(16)));

INLINE vf vf_zero(void) { return (vf){0, 0, 0, 0}; }
INLINE vf vf_load(const float *p)
{
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_min(vf a, vf b)
{
    vi less = a < b;
    return (vf)(((vi)a & less) | ((vi)b & ~less));
}
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_add(vf a, vf b) { return a + b; }
#ifdef __aarch64__ /* the build forbids the compiler to fuse by itself */
#include <arm_neon.h>
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
#endif
INLINE vf vf_set(float x) { return (vf){x, x, x, x}; }
INLINE vf vf_int(vi a) { return __builtin_convertvector(a, vf); }
INLINE float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }

INLINE vf vf_quad(const float *p) { return vf_load(p); }
/* The lanes of both with even numbers, and with odd ones. */
INLINE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    *even = (vf){a[0], a[2], b[0], b[2]};
    *odd = (vf){a[1], a[3], b[1], b[3]};
}

/* Shift the fp16 fields into place and let one multiplication re-bias the exponent: exact, subnormals included. */
INLINE vf from_f16(vu half)
{
    vf magnitude = (vf)((half & 0x7fff) << 13) * vf_set(0x1p112f);
    return (vf)((vu)magnitude | (half & 0x8000) << 16);
}
INLINE vu load_u16(const uint8_t *p)
{
    uint16_t half[4];
    memcpy(half, p, sizeof half);
    return (vu){half[0], half[1], half[2], half[3]};
}
INLINE vf vf_f16(const uint8_t *p) { return from_f16(load_u16(p)); }
INLINE vf vf_bf16(const uint8_t *p) { return (vf)(load_u16(p) << 16); }
INLINE vf vf_u8(const uint8_t *p) { return vf_int((vi){p[0], p[1], p[2], p[3]}); }
INLINE vf vf_i8(const uint8_t *p) { return vf_int((vi){(int8_t)p[0], (int8_t)p[1], (int8_t)p[2], (int8_t)p[3]}); }
INLINE vf vf_e8m0(const uint8_t *p) { return (vf)((vu){p[0], p[1], p[2], p[3]} << 23); }

INLINE vf vf_levels(const float *table, const uint8_t *index)
{
    return (vf){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

/* A step of 4 groups lies within one superblock. */
INLINE vf vf_super(const uint8_t *p)
{
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return from_f16((vu){half, half, half, half});
}
INLINE void vf_super_pair(const uint8_t *p, vf *scale, vf *less)
{
    *scale = vf_super(p);
    *less = vf_super(p + 2);
}

INLINE vf vf_order(vf p) { return p; }

INLINE vb vb_load(const void *p)
{
    vb a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE vb vb_zero(void) { return (vb){0}; }
INLINE vb vb_or(vb a, vb b) { return a | b; }
INLINE vb vb_low(vb a) { return a & 15; }
INLINE vb vb_high(vb a) { return a >> 4; }
INLINE vb vb_table(const int8_t *table, vb index)
{
#ifdef __clang__
    vb out;
    for (int i = 0; i < 16; i++)
        out[i] = (uint8_t)table[index[i]];
    return out;
#else
    return __builtin_shuffle(vb_load(table), index);
#endif
}

INLINE void vb_high1(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    int in = (int)(g % 8) + b, at = in / 2 * 2;
    vb bits = vb_load(row + g / 8 * 32 + in % 2 * 16);
    *lo = (bits >> at & 1) << 4;
    *hi = (bits >> (at + 1) & 1) << 4;
}
INLINE void vb_high2(const uint8_t *row, long g, int b, vb *lo, vb *hi)
{
    int in = (int)(g % 8) + b, at = in / 4 * 4;
    vb bits = vb_load(row + g / 8 * 64 + in % 4 * 16);
    *lo = (bits >> at & 3) << 4;
    *hi = (bits >> (at + 2) & 3) << 4;
}

/* Byte products by way of 16-bit lanes: even bytes are shifted up and down again, odd bytes down. */
INLINE vs even(vb a) { return (vs)((vs)a << 8) >> 8; }
INLINE vs odd(vb a) { return (vs)a >> 8; }
INLINE vi widen(vs pairs) { return (((vi)pairs << 16) >> 16) + ((vi)pairs >> 16); }
INLINE vs pair_products(vb w, vb x) { return even(w) * even(x) + odd(w) * odd(x); }


#define SIGNED_ZERO 0
INLINE vb vb_signed(vb w) { return w; }

/* Turn 4 rows of 4 dwords into 4 columns. */
INLINE void vb_transpose(vb *r)
{
    vu in[4], out[4];
    for (int i = 0; i < 4; i++)
        in[i] = (vu)r[i];
    for (int i = 0; i < 4; i++)
        out[i] = (vu){in[0][i], in[1][i], in[2][i], in[3][i]};
    for (int i = 0; i < 4; i++)
        r[i] = (vb)out[i];
}
INLINE void vb_transpose4(vb *r) { vb_transpose(r); }
INLINE void vf_transpose(vf *r)
{
    vb bits[4];
    for (int i = 0; i < 4; i++)
        bits[i] = (vb)r[i];
    vb_transpose(bits);
    for (int i = 0; i < 4; i++)
        r[i] = (vf)bits[i];
}

/* Sums of products of interleaved codes with four values of a token, `four`. Unsigned ones stay in 16-bit pairs,
 * which hold as many as kernels_panel.h says; one signed product fills them. */
#define VA_SIGNED_SPAN 1
typedef vs va;
INLINE vi vi_zero(void) { return (vi){0, 0, 0, 0}; }
INLINE va va_zero(void) { return (va){0, 0, 0, 0, 0, 0, 0, 0}; }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vb vb_four(const int8_t *x)
{
    uint32_t dword;
    memcpy(&dword, x, sizeof dword);
    return (vb)(vu){dword, dword, dword, dword};
}
INLINE va va_add(va sum, vb w, vb four, const int is_signed)
{
    (void)is_signed;
    return sum + pair_products(w, four);
}
INLINE vi vi_part(va sum, const int is_signed)
{
    (void)is_signed;
    return widen(sum);
}
