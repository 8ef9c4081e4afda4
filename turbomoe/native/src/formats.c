/* The arithmetic of the planes. */
#include "formats.h"

#include <stdint.h>
#include <string.h>

static const int scale_bytes[] = {0, 2, 1, 1, 2}, min_bytes[] = {0, 2, 1};

static void row_bytes(tm_matrix *m, const tm_format *f, long cols)
{
    long groups = cols / TM_GROUP, supers = cols / TM_SUPER;
    m->row[TM_CODES] = cols * f->code_bits / 8;
    m->row[TM_HIGH] = f->high_bits * 32 * ((cols + TM_SUPER - 1) / TM_SUPER);
    m->row[TM_SCALES] = groups * scale_bytes[f->scale];
    m->row[TM_MINS] = groups * min_bytes[f->min];
    m->row[TM_SUPERS] = f->scale == TM_SCALE_TWO ? 4 * supers : f->scale == TM_SCALE_HALF ? 2 * supers : 0;
}

/* Kernels read whole steps of TM_STEP values. Where a row is no whole number of steps the last row's reads run
 * past its plane, into these zeros: a NaN read there would survive multiplication by a zero activation. */
long tm_plane_bytes(const tm_matrix *m, long row)
{
    long slack = m->cols % TM_STEP ? TM_ALIGN : 0;
    return tm_round_up(row * m->rows + slack, TM_ALIGN);
}

size_t tm_matrix_view(tm_matrix *m, int format, int rows, int cols, const void *blob)
{
    memset(m, 0, sizeof *m);
    if (format < 0 || format >= TM_FORMATS || rows < 1 || cols < 1 || cols > 1 << 24)
        return 0;
    const tm_format *f = &tm_formats[format];
    if (cols % f->block)
        return 0;
    m->format = format, m->rows = rows, m->cols = cols, m->blob = blob;
    row_bytes(m, f, cols);
    long at = 0;
    for (int p = 0; p < TM_PLANES; p++) {
        m->at[p] = at;
        at += m->row[p] ? tm_plane_bytes(m, m->row[p]) : 0;
    }
    return (size_t)at;
}
