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

/* The 32 fifth bits of group `g`, value j at bit j, into the line of 8 groups. */
static void put_high1(uint8_t *high, long g, uint32_t bits)
{
    int in = (int)(g % 8), at = in / 2 * 2;
    uint8_t *to = high + g / 8 * 32 + in % 2 * 16;
    for (int j = 0; j < 16; j++)
        to[j] |= (uint8_t)((bits >> j & 1) << at | (bits >> (16 + j) & 1) << (at + 1));
}

/* A group's 32 nibbles, of bytes in value order, to plane order: value j beside value 16 + j. */
static void put_nibbles(uint8_t *to, const uint8_t *bytes, int high)
{
    for (int j = 0; j < 16; j++)
        to[j] = high ? (uint8_t)(bytes[j] >> 4 | (bytes[16 + j] & 0xf0)) : (uint8_t)((bytes[j] & 15) | bytes[16 + j] << 4);
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
        put_high1(o->high, g, b[at] | (uint32_t)b[at + 1] << 8 | (uint32_t)b[at + 2] << 16 | (uint32_t)b[at + 3] << 24);
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

/* Bit i of byte j is the fifth bit of value j of group i. A line wants groups of one parity together, every second bit
 * for first halves and the others for second halves. */
static void pack_high_k5(uint8_t *line, const uint8_t *high)
{
    for (int t = 0; t < 2; t++)
        for (int j = 0; j < 16; j++)
            line[16 * t + j] = (uint8_t)((high[j] >> t & 0x55) | (high[16 + j] >> t & 0x55) << 1);
}

static int pack_k45(const tm_format *f, const uint8_t *b, long block, row_out *o)
{
    long g0 = 8 * block;
    memcpy(o->supers + 4 * block, b, 4);
    unpack_six(b + 4, o->scales + g0, o->mins + g0);
    const uint8_t *high = b + 16, *low = f->high_bits ? b + 48 : b + 16;
    for (int i = 0; i < 8; i++)
        put_nibbles(o->codes + 16 * (g0 + i), low + i / 2 * 32, i % 2);
    if (f->high_bits)
        pack_high_k5(o->high + 32 * block, high);
    return finite16(b) && finite16(b + 2);
}

/* Bits 2q and 2q + 1 of byte j of a half are the fifth and sixth bit of value j of its group q. */
static void pack_high_k6(uint8_t *line, const uint8_t *high)
{
    for (int q = 0; q < 4; q++)
        for (int j = 0; j < 16; j++)
            line[16 * q + j] = (uint8_t)((high[j] >> 2 * q & 3) | (high[16 + j] >> 2 * q & 3) << 2
                                         | (high[32 + j] >> 2 * q & 3) << 4 | (high[48 + j] >> 2 * q & 3) << 6);
}

static int pack_q6k(const tm_format *f, const uint8_t *b, long block, row_out *o)
{
    (void)f;
    const uint8_t *scale = b + 192;
    long groups = o->cols / TM_GROUP, g0 = 8 * block;
    memcpy(o->supers + 2 * block, b + 208, 2);
    for (int i = 0; i < 8; i++) {
        o->scales[g0 + i] = scale[2 * i];
        o->scales[groups + g0 + i] = scale[2 * i + 1];
        put_nibbles(o->codes + 16 * (g0 + i), b + i / 4 * 64 + i % 2 * 32, i % 4 / 2);
    }
    pack_high_k6(o->high + 64 * block, b + 128);
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

static uint8_t *at_row(const tm_matrix *m, int plane, long row)
{
    return (uint8_t *)(uintptr_t)tm_row(m, plane, row);
}

/* Alignment and over-read slack behind the last row of each plane: zeros, so that a blob is a function of its matrix. */
static void zero_slack(const tm_matrix *m)
{
    for (int p = 0; p < TM_PLANES; p++)
        if (m->row[p])
            memset(at_row(m, p, m->rows), 0, (size_t)(tm_plane_bytes(m, m->row[p]) - m->row[p] * m->rows));
}

static int pack_row(const tm_matrix *m, const uint8_t *raw, long row)
{
    const tm_format *f = &tm_formats[m->format];
    row_out o = {at_row(m, TM_CODES, row), at_row(m, TM_HIGH, row), at_row(m, TM_SCALES, row),
                 at_row(m, TM_MINS, row), at_row(m, TM_SUPERS, row), m->cols};
    if (tm_is_float(m->format)) {
        memcpy(o.codes, raw, (size_t)m->row[TM_CODES]);
        return finite_floats(m->format, raw, m->cols);
    }
    memset(o.codes, 0, (size_t)m->row[TM_CODES]);
    memset(o.high, 0, (size_t)m->row[TM_HIGH]);
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
