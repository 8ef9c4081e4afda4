/* Element-wise work: quantising activations and the gate. Plain loops that the compiler vectorises for each level,
 * over the group primitives of rounding_*.h. */
#include "nearest.h"

static void quantise(const float *x, tm_act to, long first, long n)
{
    for (long g = first; g < first + n; g++) {
        const float *from = x + (g - first) * TM_GROUP;
        int32_t sum[2];
        float most = group_peak(from), inverse = most > 0x1p-100f && most < 0x1p120f ? 127.0f / most : 0.0f;
        group_round(from, inverse, to.first + g * 16, to.second + g * 16, sum);
        float scale = most < 0x1p120f ? most / 127.0f : (float)NAN;
        to.scale[g] = scale;
        to.sum[g] = scale * (float)(sum[0] + sum[1]);
        to.sum2[g] = scale * (float)sum[1];
    }
}

/* e^x to 2 ulp: 2^k times a polynomial on [-ln2/2, ln2/2], clamped where float ends. NaN passes through. */
INLINE float exp_fast(float x)
{
    float y = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    int32_t k = nearest(y * 0x1.715476p0f), bits = (k + 127) << 23;
    float r = y - (float)k * 0x1.62e4p-1f - (float)k * 0x1.7f7d1cp-20f, scale;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

INLINE float logistic(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

/* tanh form of GELU: x * logistic(2u), u = sqrt(2/pi) * (x + 0.044715 x^3). */
INLINE float gelu_tanh(float x) { return x * logistic(1.5957691216f * (x + 0.044715f * x * x * x)); }

INLINE float least(float a, float b) { return a > b ? b : a; }

static void gate(int kind, float *g, const float *up, long n, float alpha, float limit)
{
    if (kind == TM_SILU)
        for (long i = 0; i < n; i++)
            g[i] = g[i] * logistic(g[i]) * up[i];
    else if (kind == TM_GELU_TANH)
        for (long i = 0; i < n; i++)
            g[i] = gelu_tanh(g[i]) * up[i];
    else
        for (long i = 0; i < n; i++) {
            float a = least(g[i], limit), b = least(-least(-up[i], limit), limit);
            g[i] = a * logistic(alpha * a) * (b + 1.0f);
        }
}

/* float <-> bf16 and fp16, as bits; rounding to nearest even, NaN stays NaN. */
INLINE float bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float half_float(uint16_t half)
{
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x70000000u : 0; /* lifts exponent 31 to 255 */
    return bits_float((float_bits(bits_float(magnitude) * 0x1p112f) + special) | sign);
}

/* Through float addition: adding 2^(e+13) of the result's exponent drops the bits that fp16 does not keep. */
INLINE uint16_t float_half(float x)
{
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t exponent = magnitude & 0x7f800000;
    exponent = exponent < 0x38800000 ? 0x38800000 : exponent;
    float anchor = bits_float((exponent + 0x06800000) & 0x7f800000);
    float rounded = (bits_float(magnitude) + anchor) - anchor;
    uint32_t half = float_bits(rounded * 0x1p-112f) >> 13;
    half = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : half;
    return (uint16_t)(sign | half);
}

INLINE uint16_t float_brain(float x)
{
    uint32_t bits = float_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static void widen_floats(int type, const void *from, float *to, long n)
{
    const uint16_t *bits = from;
    if (type == TM_TYPE_F32)
        memcpy(to, from, (size_t)n * sizeof *to);
    else if (type == TM_TYPE_BF16)
        for (long i = 0; i < n; i++)
            to[i] = bits_float((uint32_t)bits[i] << 16);
    else
        for (long i = 0; i < n; i++)
            to[i] = half_float(bits[i]);
}

static void narrow_floats(int type, const float *from, void *to, long n)
{
    uint16_t *bits = to;
    if (type == TM_TYPE_F32)
        memcpy(to, from, (size_t)n * sizeof *from);
    else if (type == TM_TYPE_BF16)
        for (long i = 0; i < n; i++)
            bits[i] = float_brain(from[i]);
    else
        for (long i = 0; i < n; i++)
            bits[i] = float_half(from[i]);
}

static unsigned long long read_memory(const void *from, size_t bytes)
{
    const uint64_t *words = from;
    uint64_t sum[32] = {0}, all = 0;
    size_t n = bytes / 8, i = 0;
    for (; i + 32 <= n; i += 32) {
        for (int j = 0; j < 32; j += 8)
            PREFETCH(words + i + j + PREFETCH_BYTES / 8);
        for (int j = 0; j < 32; j++)
            sum[j] += words[i + (size_t)j];
    }
    for (; i < n; i++)
        sum[0] += words[i];
    for (int j = 0; j < 32; j++)
        all += sum[j];
    return all;
}
