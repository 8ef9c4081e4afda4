/* A packed matrix read value by value, and experts computed in double: slow and plain, from docs/packed-layout.md. */
#ifndef NAIVE_H
#define NAIVE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"
#include "level.h"

static double naive_half(const uint8_t *p)
{
    int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

static int naive_code(const tm_matrix *m, const tm_format *f, long r, long c)
{
    long g = c / 32;
    int j = (int)(c % 32), in = (int)(g % 8);
    const uint8_t *codes = tm_row(m, TM_CODES, r), *high = tm_row(m, TM_HIGH, r);
    if (f->code_bits == 8)
        return (int8_t)codes[(j < 16 ? 0 : m->cols / 2) + g * 16 + j % 16];
    int code = codes[g * 16 + j % 16] >> (j / 16 * 4) & 15;
    if (f->high_bits == 1)
        code |= (high[g / 8 * 32 + in % 2 * 16 + j % 16] >> (in / 2 * 2 + j / 16) & 1) << 4;
    if (f->high_bits == 2)
        code |= (high[g / 8 * 64 + in % 4 * 16 + j % 16] >> (in / 4 * 4 + j / 16 * 2) & 3) << 4;
    if (m->format == TM_IQ4_NL)
        return tm_table_iq4nl[code];
    return (m->format == TM_MXFP4 ? tm_table_mxfp4[code] : code) - f->zero;
}

static double naive_float(const tm_matrix *m, long r, long c)
{
    const uint8_t *at = tm_row(m, TM_CODES, r);
    float x;
    if (m->format == TM_F16)
        return naive_half(at + 2 * c);
    if (m->format == TM_F32)
        memcpy(&x, at + 4 * c, 4);
    else {
        uint32_t bits = (uint32_t)(at[2 * c] << 16) | (uint32_t)at[2 * c + 1] << 24;
        memcpy(&x, &bits, 4);
    }
    return x;
}

static double naive_value(const tm_matrix *m, long r, long c)
{
    const tm_format *f = &tm_formats[m->format];
    if (tm_is_float(m->format))
        return naive_float(m, r, c);
    long g = c / 32, groups = m->cols / 32;
    const uint8_t *scales = tm_row(m, TM_SCALES, r), *mins = tm_row(m, TM_MINS, r);
    const uint8_t *supers = tm_row(m, TM_SUPERS, r);
    int code = naive_code(m, f, r, c);
    double scale, less = 0;
    if (f->scale == TM_SCALE_F16)
        scale = naive_half(scales + 2 * g);
    else if (f->scale == TM_SCALE_E8M0)
        scale = ldexp(1, scales[g] - 128);
    else if (f->scale == TM_SCALE_TWO)
        scale = naive_half(supers + c / 256 * 4) * scales[g];
    else
        scale = naive_half(supers + c / 256 * 2) * (int8_t)scales[(c % 32 < 16 ? 0 : groups) + g];
    if (f->min == TM_MIN_F16)
        less = -naive_half(mins + 2 * g);
    if (f->min == TM_MIN_TWO)
        less = naive_half(supers + c / 256 * 4 + 2) * mins[g];
    return scale * code - less;
}

/* Round to int8 per 32 values, as quantised weights see activations. */
static void naive_round(const float *x, double *to, long n, int format)
{
    for (long i = 0; i < n; i++) {
        to[i] = x[i];
        if (tm_is_float(format))
            continue;
        float most = 0;
        for (long j = i / 32 * 32; j < i / 32 * 32 + 32; j++)
            most = fmaxf(most, fabsf(x[j]));
        float inverse = most > 0x1p-100f ? 127.0f / most : 0;
        to[i] = (double)nearbyintf(x[i] * inverse) * (most / 127.0f);
    }
}

/* All values of a matrix, to be freed. */
static double *naive_matrix(const tm_matrix *m)
{
    double *values = malloc(sizeof *values * (size_t)m->rows * (size_t)m->cols);
    for (long r = 0; r < m->rows; r++)
        for (long c = 0; c < m->cols; c++)
            values[r * m->cols + c] = naive_value(m, r, c);
    return values;
}

static void naive_linear(const tm_matrix *m, const double *values, const float *x, const float *bias, float *out)
{
    double *rounded = malloc(sizeof *rounded * (size_t)m->cols);
    naive_round(x, rounded, m->cols, m->format);
    for (long r = 0; r < m->rows; r++) {
        double sum = bias ? bias[r] : 0;
        for (long c = 0; c < m->cols; c++)
            sum += values[r * m->cols + c] * rounded[c];
        out[r] = (float)sum;
    }
    free(rounded);
}

static double naive_gate(const tm_experts *l, double gate, double up)
{
    if (l->gate == TM_SILU)
        return gate / (1 + exp(-gate)) * up;
    if (l->gate == TM_GELU_TANH)
        return 0.5 * gate * (1 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up;
    gate = fmin(gate, l->limit);
    return gate / (1 + exp(-l->alpha * gate)) * (fmax(fmin(up, l->limit), -l->limit) + 1);
}

/* The values of one expert's matrices, made when first wanted. */
typedef struct {
    double *gate, *up, *down;
} naive_values;

static void naive_expert(const tm_experts *l, int64_t id, const float *x, naive_values *v, float *out)
{
    const char *blob = l->blobs[id];
    tm_matrix gate, up, down;
    tm_matrix_view(&gate, l->gate_format, l->width, l->hidden, blob + l->gate_at);
    tm_matrix_view(&up, l->up_format, l->width, l->hidden, blob + l->up_at);
    tm_matrix_view(&down, l->down_format, l->hidden, l->width, blob + l->down_at);
    if (!v->gate)
        *v = (naive_values){naive_matrix(&gate), naive_matrix(&up), naive_matrix(&down)};
    float *g = malloc(sizeof *g * (size_t)l->width), *u = malloc(sizeof *u * (size_t)l->width);
#define BIAS(at) ((at) < 0 ? NULL : (const float *)(const void *)(blob + (at)))
    naive_linear(&gate, v->gate, x, BIAS(l->gate_bias_at), g);
    naive_linear(&up, v->up, x, BIAS(l->up_bias_at), u);
    for (long i = 0; i < l->width; i++)
        g[i] = (float)naive_gate(l, g[i], u[i]);
    naive_linear(&down, v->down, g, BIAS(l->down_bias_at), out);
#undef BIAS
    free(g);
    free(u);
}

#endif
