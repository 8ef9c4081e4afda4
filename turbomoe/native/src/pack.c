/* Packing: every GGUF block format taken apart into planes. Runs once at load; no arithmetic, only bits moved. */
#include "pack.h"

#include <string.h>

/* One row being written. */
typedef struct {
    uint8_t *codes, *high, *scales, *mins, *supers;
    long cols;
} row_out;

static int finite16(const uint8_t *p) { return (p[1] & 0x7c) != 0x7c; }
static int finite_bf16(const uint8_t *p) { return (p[1] & 0x7f) != 0x7f || !(p[0] & 0x80); }

/* Put the bits of value `j` (0..31) of group `g` into the high plane; `bits` holds them at bit 0. */
static void put_high1(uint8_t *high, long g, int j, int bits)
{
    int in = (int)(g % 8);
    high[g / 8 * 32 + in % 2 * 16 + j % 16] |= (uint8_t)(bits << (in / 2 * 2 + j / 16));
}

static void put_high2(uint8_t *high, long g, int j, int bits)
{
    int in = (int)(g % 8);
    high[g / 8 * 64 + in % 4 * 16 + j % 16] |= (uint8_t)(bits << (in / 4 * 4 + j / 16 * 2));
}

static void put_code(const row_out *o, long g, int j, int code)
{
    o->codes[g * 16 + j % 16] |= (uint8_t)((code & 15) << (j / 16 * 4));
}

/* Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL: fp16 scale [, fp16 min] [, 32 high bits], 16 bytes of nibbles in plane order. */
static int pack_q32(const tm_format *f, const uint8_t *b, long g, row_out *o)
{
    memcpy(o->scales + 2 * g, b, 2);
    int ok = finite16(b), at = 2;
    if (f->min) {
        memcpy(o->mins + 2 * g, b + at, 2);
        ok &= finite16(b + at);
        at += 2;
    }
    if (f->high_bits) {
        for (int j = 0; j < 32; j++)
            put_high1(o->high, g, j, b[at + j / 8] >> j % 8 & 1);
        at += 4;
    }
    memcpy(o->codes + 16 * g, b + at, 16);
    return ok;
}

static int pack_mxfp4(const tm_format *f, const uint8_t *b, long g, row_out *o)
{
    (void)f;
    o->scales[g] = b[0];
    memcpy(o->codes + 16 * g, b + 1, 16);
    return b[0] != 255;
}

/* Eight-bit rows: the first halves of all groups, then the second halves, so that lanes match the nibble formats. */
static int pack_q8(const tm_format *f, const uint8_t *b, long g, row_out *o)
{
    (void)f;
    memcpy(o->scales + 2 * g, b, 2);
    memcpy(o->codes + 16 * g, b + 2, 16);
    memcpy(o->codes + o->cols / 2 + 16 * g, b + 18, 16);
    return finite16(b);
}

/* The 6-bit scales and mins of Q4_K and Q5_K: 8 of each in 12 bytes. */
static void unpack_six(const uint8_t *s, uint8_t *scale, uint8_t *min)
{
    for (int i = 0; i < 4; i++) {
        scale[i] = s[i] & 63;
        min[i] = s[4 + i] & 63;
        scale[4 + i] = (uint8_t)((s[8 + i] & 15) | s[i] >> 6 << 4);
        min[4 + i] = (uint8_t)(s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
    }
}

static int pack_k45(const tm_format *f, const uint8_t *b, long block, row_out *o)
{
    long g0 = 8 * block;
    memcpy(o->supers + 4 * block, b, 4);
    unpack_six(b + 4, o->scales + g0, o->mins + g0);
    const uint8_t *high = b + 16, *low = f->high_bits ? b + 48 : b + 16;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 32; j++) {
            put_code(o, g0 + i, j, low[i / 2 * 32 + j] >> i % 2 * 4);
            if (f->high_bits)
                put_high1(o->high, g0 + i, j, high[j] >> i & 1);
        }
    return finite16(b) && finite16(b + 2);
}

static int pack_q6k(const tm_format *f, const uint8_t *b, long block, row_out *o)
{
    (void)f;
    const uint8_t *low = b, *high = b + 128, *scale = b + 192;
    long groups = o->cols / TM_GROUP, g0 = 8 * block;
    memcpy(o->supers + 2 * block, b + 208, 2);
    for (int i = 0; i < 8; i++) {
        int half = i / 4, quarter = i % 4;
        o->scales[g0 + i] = scale[2 * i];
        o->scales[groups + g0 + i] = scale[2 * i + 1];
        for (int j = 0; j < 32; j++) {
            put_code(o, g0 + i, j, low[half * 64 + quarter % 2 * 32 + j] >> quarter / 2 * 4);
            put_high2(o->high, g0 + i, j, high[half * 32 + j] >> quarter * 2 & 3);
        }
    }
    return finite16(b + 208);
}

static int finite_floats(int format, const uint8_t *p, long n)
{
    int ok = 1;
    for (long i = 0; i < n; i++)
        ok &= format == TM_F16 ? finite16(p + 2 * i) : finite_bf16(p + (format == TM_F32 ? 4 * i + 2 : 2 * i));
    return ok;
}

typedef int (*pack_block)(const tm_format *, const uint8_t *, long, row_out *);

static const pack_block packers[TM_FORMATS] = {
    [TM_Q4_0] = pack_q32, [TM_Q4_1] = pack_q32, [TM_Q5_0] = pack_q32, [TM_Q5_1] = pack_q32, [TM_IQ4_NL] = pack_q32,
    [TM_Q8_0] = pack_q8, [TM_MXFP4] = pack_mxfp4, [TM_Q4_K] = pack_k45, [TM_Q5_K] = pack_k45, [TM_Q6_K] = pack_q6k,
};

static uint8_t *at_row(const uint8_t *plane, long row, long bytes)
{
    return plane ? (uint8_t *)(uintptr_t)plane + row * bytes : NULL;
}

/* Alignment and over-read slack behind the last row of each plane: zeros, so that a blob is a function of its matrix. */
static void zero_slack(const tm_matrix *m)
{
    const uint8_t *planes[] = {m->codes, m->high, m->scales, m->mins, m->supers};
    long rows[] = {m->codes_row, m->high_row, m->scales_row, m->mins_row, m->supers_row};
    for (int i = 0; i < 5; i++) {
        long used = rows[i] * m->rows;
        if (used)
            memset(at_row(planes[i], 0, 0) + used, 0, (size_t)(tm_plane_bytes(m, rows[i]) - used));
    }
}

static int pack_row(const tm_matrix *m, const uint8_t *raw, long row)
{
    const tm_format *f = &tm_formats[m->format];
    row_out o = {at_row(m->codes, row, m->codes_row), at_row(m->high, row, m->high_row),
                 at_row(m->scales, row, m->scales_row), at_row(m->mins, row, m->mins_row),
                 at_row(m->supers, row, m->supers_row), m->cols};
    if (tm_is_float(m->format)) {
        memcpy(o.codes, raw, (size_t)m->codes_row);
        return finite_floats(m->format, raw, m->cols);
    }
    memset(o.codes, 0, (size_t)m->codes_row);
    if (o.high)
        memset(o.high, 0, (size_t)m->high_row);
    int ok = 1;
    for (long b = 0; b < m->cols / f->block; b++)
        ok &= packers[m->format](f, raw + b * f->block_bytes, b, &o);
    return ok;
}

long tm_pack_rows(const tm_matrix *m, const void *raw, long row, long n)
{
    const tm_format *f = &tm_formats[m->format];
    long bytes = (long)m->cols / f->block * f->block_bytes;
    for (long r = row; r < row + n; r++)
        if (!pack_row(m, (const uint8_t *)raw + r * bytes, r))
            return r;
    if (row + n == m->rows)
        zero_slack(m);
    return -1;
}
