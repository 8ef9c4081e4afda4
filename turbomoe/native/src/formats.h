/* The packed layout "planar group-32": what planes a matrix has, and where they lie in its blob.
 *
 * docs/packed-layout.md is the specification; native/layout.py states the same rules in Python and a test holds the
 * two together. A matrix of `rows` x `cols` values becomes up to five planes, each row-major, in this order:
 *
 *   codes   4 or 8 bits a value (or the 16/32-bit floats themselves)
 *   high    the fifth, or fifth and sixth, bit of a code
 *   scales  one per group of 32 values (Q6_K: one per 16)
 *   mins    one per group of 32 values
 *   supers  fp16 factors of two-level scales, one entry per 256 values
 */
#ifndef TM_FORMATS_H
#define TM_FORMATS_H

#include <stddef.h>
#include <stdint.h>

enum {
    TM_Q4_0, TM_Q4_1, TM_Q5_0, TM_Q5_1, TM_Q8_0, TM_IQ4_NL, TM_MXFP4,
    TM_Q4_K, TM_Q5_K, TM_Q6_K, TM_F16, TM_BF16, TM_F32, TM_FORMATS
};

enum { TM_GROUP = 32, TM_SUPER = 256, TM_ALIGN = 64 };

/* Activations are padded with zeros to a multiple of this, so that every kernel may run past the end of a row. */
enum { TM_STEP = 512 };

enum { TM_SCALE_NONE, TM_SCALE_F16, TM_SCALE_E8M0, TM_SCALE_TWO, TM_SCALE_HALF };
enum { TM_MIN_NONE, TM_MIN_F16, TM_MIN_TWO };

/* Constant facts of a format. `zero` is the code that means 0 where that is a constant of the format. */
typedef struct {
    const char *name;
    int block, block_bytes;    /* of the GGUF block that it is packed from */
    int code_bits, high_bits;
    int scale, min;
    int zero;
    int table;                 /* codes index a table of 16 values */
} tm_format;

/* In the header, so that kernels compiled for one format fold its facts away. */
static const tm_format tm_formats[TM_FORMATS] = {
    [TM_Q4_0] = {"Q4_0", 32, 18, 4, 0, TM_SCALE_F16, TM_MIN_NONE, 8, 0},
    [TM_Q4_1] = {"Q4_1", 32, 20, 4, 0, TM_SCALE_F16, TM_MIN_F16, 0, 0},
    [TM_Q5_0] = {"Q5_0", 32, 22, 4, 1, TM_SCALE_F16, TM_MIN_NONE, 16, 0},
    [TM_Q5_1] = {"Q5_1", 32, 24, 4, 1, TM_SCALE_F16, TM_MIN_F16, 0, 0},
    [TM_Q8_0] = {"Q8_0", 32, 34, 8, 0, TM_SCALE_F16, TM_MIN_NONE, 0, 0},
    [TM_IQ4_NL] = {"IQ4_NL", 32, 18, 4, 0, TM_SCALE_F16, TM_MIN_NONE, 0, 1},
    [TM_MXFP4] = {"MXFP4", 32, 17, 4, 0, TM_SCALE_E8M0, TM_MIN_NONE, 12, 1},
    [TM_Q4_K] = {"Q4_K", 256, 144, 4, 0, TM_SCALE_TWO, TM_MIN_TWO, 0, 0},
    [TM_Q5_K] = {"Q5_K", 256, 176, 4, 1, TM_SCALE_TWO, TM_MIN_TWO, 0, 0},
    [TM_Q6_K] = {"Q6_K", 256, 210, 4, 2, TM_SCALE_HALF, TM_MIN_NONE, 32, 0},
    [TM_F16] = {"F16", 1, 2, 16, 0, TM_SCALE_NONE, TM_MIN_NONE, 0, 0},
    [TM_BF16] = {"BF16", 1, 2, 16, 0, TM_SCALE_NONE, TM_MIN_NONE, 0, 0},
    [TM_F32] = {"F32", 1, 4, 32, 0, TM_SCALE_NONE, TM_MIN_NONE, 0, 0},
};

/* Values from the GGUF format. MXFP4 holds twice the value of its four-bit float, plus 12: its scale is halved, and
 * as an unsigned table it needs no signed products. */
static const int8_t tm_table_iq4nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t tm_table_mxfp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

enum { TM_CODES, TM_HIGH, TM_SCALES, TM_MINS, TM_SUPERS, TM_PLANES };

/* Where one matrix lies: its blob, and for each plane its byte offset there and its bytes per row (0: no such plane). */
typedef struct {
    int format, rows, cols;
    const uint8_t *blob;
    long at[TM_PLANES], row[TM_PLANES];
} tm_matrix;

/* Fill `m` for a matrix that starts at `blob` (64-byte aligned). Returns its packed bytes, or 0 for a shape or a
 * format that does not exist. `blob` may be NULL, to ask for the size or to fill it in later. */
size_t tm_matrix_view(tm_matrix *m, int format, int rows, int cols, const void *blob);

/* Row `r` of a plane. */
static inline const uint8_t *tm_row(const tm_matrix *m, int plane, long r)
{
    return m->blob + m->at[plane] + r * m->row[plane];
}

/* Bytes of a plane with `row` bytes per row, slack and alignment included. */
long tm_plane_bytes(const tm_matrix *m, long row);

static inline int tm_is_float(int format) { return format >= TM_F16; }
static inline long tm_round_up(long n, long to) { return (n + to - 1) / to * to; }

#endif
