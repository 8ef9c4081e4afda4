/* The row kernels, written once and compiled for every dispatch level.
 *
 * A level_*.c file includes one simd_*.h, which defines LANES (4, 8 or 16), TILE and PANEL_TILE (tokens at a time, as many as
 * registers hold), the types vf (LANES floats), vi (LANES int32) and vb (4 * LANES bytes), and primitives on them.
 *
 * A step is LANES groups of 32 values. It has 4 blocks; a block is one vb of first halves (value 0..15 of each of
 * its LANES / 4 groups) and one vb of second halves. Transposed, every group has one int32 lane of a dot product: a
 * step is converted and scaled once, whatever T. Activations are kept in that order (act_at): lane i is the group that
 * vf_order puts there.
 * Rows may end inside a step: activations are zero there, and what the weights read is finite (formats.c).
 */

/* Measured: the second-level cache, 8 KiB ahead. Into the first level, or nearer, halves the read rate. */
#define PREFETCH_BYTES 8192
#define PREFETCH(p) __builtin_prefetch((p), 0, 2)

/* The lane of group `g` within its step. */
INLINE long lane_of(long g) { return g % (LANES / 4) * 4 + g % LANES / (LANES / 4); }
/* Where group `g` starts among activations: four values, the next four 4 * LANES further on. */
INLINE long act_at(long g) { return g / LANES * LANES * TM_GROUP + 4 * lane_of(g); }
/* Where its scale is; sums of groups are in the order of groups. */
INLINE long scale_at(long g) { return g / LANES * LANES + lane_of(g); }

/* Where the planes of one row start. */
typedef struct {
    const uint8_t *codes, *high, *scales, *mins, *supers;
} row_at;

INLINE row_at row_of(const tm_matrix *m, long r)
{
    return (row_at){tm_row(m, TM_CODES, r), tm_row(m, TM_HIGH, r), tm_row(m, TM_SCALES, r), tm_row(m, TM_MINS, r),
                    tm_row(m, TM_SUPERS, r)};
}

/* Factors of the groups of one step: w = scale * code - less (scale2 for second halves, Q6_K only). */
typedef struct {
    vf scale, scale2, less;
} step_factors;

INLINE step_factors factors(const int F, const tm_matrix *m, row_at w, long g)
{
    const tm_format *f = &tm_formats[F];
    step_factors s = {vf_zero(), vf_zero(), vf_zero()};
    if (f->scale == TM_SCALE_TWO) { /* and TM_MIN_TWO: no format has one without the other */
        vf super, less;
        vf_super_pair(w.supers + g / 8 * 4, &super, &less);
        s.scale = vf_mul(vf_u8(w.scales + g), super);
        s.less = vf_mul(vf_u8(w.mins + g), less);
        return s;
    }
    if (f->scale == TM_SCALE_F16)
        s.scale = vf_f16(w.scales + 2 * g);
    else if (f->scale == TM_SCALE_E8M0)
        s.scale = vf_mul(vf_e8m0(w.scales + g), vf_set(0.5f));
    else {
        vf super = vf_super(w.supers + g / 8 * 2);
        s.scale = vf_mul(vf_i8(w.scales + g), super);
        s.scale2 = vf_mul(vf_i8(w.scales + m->cols / TM_GROUP + g), super);
    }
    if (f->min == TM_MIN_F16)
        s.less = vf_mul(vf_f16(w.mins + 2 * g), vf_set(-1.0f));
    return s;
}

/* Does this format's kernel see signed codes? Then a level may have moved them up by SIGNED_ZERO. */
#define SIGNED(F) ((F) == TM_IQ4_NL || tm_formats[F].code_bits == 8)
#define ZERO(F) (float)(SIGNED(F) ? SIGNED_ZERO : tm_formats[F].zero)

/* How many products of codes can be summed before 16 bits overflow (levels without 16-bit sums do not mind). */
#define SPAN(F)                                                                                                        \
    (SIGNED(F) ? VA_SIGNED_SPAN : tm_formats[F].high_bits == 2 ? 2 : tm_formats[F].high_bits || tm_formats[F].table ? 4 : 8)

/* Split bytes of two codes: of first halves into lo, of second halves into hi. */
INLINE void split(const int F, vb both, vb *lo, vb *hi)
{
    *lo = vb_low(both);
    *hi = vb_high(both);
    if (!tm_formats[F].table)
        return;
    const int8_t *table = F == TM_MXFP4 ? tm_table_mxfp4 : tm_table_iq4nl;
    *lo = vb_table(table, *lo);
    *hi = vb_table(table, *hi);
    if (SIGNED(F)) {
        *lo = vb_signed(*lo);
        *hi = vb_signed(*hi);
    }
}

/* The codes of block `b` of the step at group `g`: first halves in lo, second halves in hi. */
INLINE void codes(const int F, const tm_matrix *m, row_at w, long g, int b, vb *lo, vb *hi)
{
    const tm_format *f = &tm_formats[F];
    const uint8_t *at = w.codes + g * 16 + b * 4 * LANES;
    vb lo_bits, hi_bits;
    if (f->code_bits == 8) {
        *lo = vb_signed(vb_load(at));
        *hi = vb_signed(vb_load(at + m->cols / 2));
        return;
    }
    split(F, vb_load(at), lo, hi);
    if (!f->high_bits)
        return;
    if (f->high_bits == 1)
        vb_high1(w.high, g, b, &lo_bits, &hi_bits);
    else
        vb_high2(w.high, g, b, &lo_bits, &hi_bits);
    *lo = vb_or(*lo, lo_bits);
    *hi = vb_or(*hi, hi_bits);
}

/* The codes of a whole step as a group's own lane wants them: vector `j` holds values 4j..4j+3 of every group's first
 * half (lo) and second half (hi), groups in vf_order. Blocks from `blocks` on are behind the row and give zeros. */
INLINE void step_codes(const int F, const tm_matrix *m, row_at w, long g, int blocks, vb *lo, vb *hi)
{
    const int together = tm_formats[F].code_bits == 4 && !tm_formats[F].high_bits; /* half as much to transpose */
    UNROLL for (int b = 0; b < 4; b++) {
        lo[b] = hi[b] = vb_zero();
        if (b >= blocks)
            continue;
        if (together)
            lo[b] = vb_load(w.codes + g * 16 + b * 4 * LANES);
        else
            codes(F, m, w, g, b, &lo[b], &hi[b]);
    }
    vb_transpose4(lo);
    if (!together)
        vb_transpose4(hi);
    else
        UNROLL for (int j = 0; j < 4; j++)
            split(F, lo[j], &lo[j], &hi[j]);
}

INLINE void prefetch_step(const int F, const tm_matrix *m, row_at w, long g)
{
    const uint8_t *at = w.codes + g * 16 + PREFETCH_BYTES;
    for (int i = 0; i < 16 * LANES; i += 64) {
        PREFETCH(at + i);
        if (tm_formats[F].code_bits == 8)
            PREFETCH(at + m->cols / 2 + i);
    }
}

/* The other planes are short: once a row, as many rows ahead as the codes are. */
INLINE void prefetch_plane(const uint8_t *row, long bytes, long ahead)
{
    for (long i = 0; i < bytes; i += 64)
        PREFETCH(row + ahead * bytes + i);
}

INLINE void prefetch_row(const int F, const tm_matrix *m, row_at w, long ahead)
{
    prefetch_plane(w.scales, m->row[TM_SCALES], ahead);
    if (tm_formats[F].high_bits)
        prefetch_plane(w.high, m->row[TM_HIGH], ahead);
    if (tm_formats[F].min)
        prefetch_plane(w.mins, m->row[TM_MINS], ahead);
    if (tm_formats[F].scale >= TM_SCALE_TWO)
        prefetch_plane(w.supers, m->row[TM_SUPERS], ahead);
}

/* Sums over one half of every group of a step: codes `w` with values `x`, as integers. */
INLINE vi half_dot(const int F, const vb *w, const int8_t *x, va *part, const int last)
{
    vi sum = vi_zero();
    UNROLL for (int j = 0; j < 4; j++) {
        *part = va_add(*part, w[j], vb_load(x + j * 4 * LANES), SIGNED(F));
        if ((j + 1) % SPAN(F) && !(j == 3 && last))
            continue;
        sum = vi_add(sum, vi_part(*part, SIGNED(F)));
        *part = va_zero();
    }
    return sum;
}

/* Products of a step's codes with one activation, added to the accumulator `sum`. */
INLINE vf step_dot(const int F, const vb *lo, const vb *hi, tm_act x, long g, vf p, vf p2, vf sum)
{
    const int half = tm_formats[F].scale == TM_SCALE_HALF;
    va part = va_zero();
    const int8_t *at = x.values + TM_GROUP * g;
    vi first = half_dot(F, lo, at, &part, half), second = half_dot(F, hi, at + 16 * LANES, &part, 1);
    if (!half)
        return vf_fma(vf_int(vi_add(first, second)), p, sum);
    return vf_fma(vf_int(second), p2, vf_fma(vf_int(first), p, sum));
}

/* What the zero point and the mins take away from a step. */
INLINE vf step_less(const int F, step_factors s, tm_act x, long g, vf sum)
{
    if (tm_formats[F].min)
        return vf_fnma(s.less, vf_load(x.sum + g), sum);
    if (ZERO(F) == 0)
        return sum;
    vf zero = vf_set(ZERO(F));
    sum = vf_fnma(vf_mul(s.scale, zero), vf_load(x.sum + g), sum);
    if (tm_formats[F].scale != TM_SCALE_HALF)
        return sum;
    vf difference = vf_fnma(s.scale, zero, vf_mul(s.scale2, zero));
    return vf_fnma(difference, vf_load(x.sum2 + g), sum);
}

/* One step of one row against T activations, each summed in the same order whatever T. */
INLINE void step(const int F, const tm_matrix *m, row_at w, long g, int blocks, const int T, const tm_act *x, vf *sum)
{
    step_factors s = factors(F, m, w, g);
    vf scale = vf_order(s.scale), scale2 = vf_order(s.scale2);
    vb lo[4], hi[4];
    step_codes(F, m, w, g, blocks, lo, hi);
    UNROLL for (int t = 0; t < T; t++) {
        vf own = vf_load(x[t].scale + g);
        sum[t] = step_less(F, s, x[t], g, sum[t]);
        sum[t] = step_dot(F, lo, hi, x[t], g, vf_mul(scale, own), vf_mul(scale2, own), sum[t]);
    }
}

INLINE void row_dot(const int F, const tm_matrix *m, long r, long ahead, const int T, const tm_act *x, float *out,
                    long stride)
{
    row_at w = row_of(m, r);
    long groups = m->cols / TM_GROUP, g = 0;
    vf sum[4];
    UNROLL for (int t = 0; t < T; t++)
        sum[t] = vf_zero();
    prefetch_row(F, m, w, ahead);
    for (; g + LANES <= groups; g += LANES) {
        prefetch_step(F, m, w, g);
        step(F, m, w, g, 4, T, x, sum);
    }
    if (g < groups)
        step(F, m, w, g, (int)(groups - g + LANES / 4 - 1) / (LANES / 4), T, x, sum);
    UNROLL for (int t = 0; t < T; t++)
        out[t * stride] = vf_sum(sum[t]);
}

INLINE void rows_dot(const int F, const tm_matrix *m, long first, long n, const int T, const tm_act *x, float *out,
                     long stride)
{
    long ahead = PREFETCH_BYTES / m->row[TM_CODES] + 1;
    for (long i = 0; i < n; i++)
        row_dot(F, m, first + i, ahead, T, x, out + i, stride);
}

/* Tokens in tiles of at most TILE (simd_*.h): as many as keep their accumulators in registers. */
INLINE void dot(const int F, const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out,
                long stride)
{
    for (int t = 0, tile; t < tokens; t += tile) {
        tm_act act[4];
        tile = tokens - t < TILE ? tokens - t : TILE;
        for (int i = 0; i < tile; i++)
            act[i] = tm_act_at((void *)(uintptr_t)x[t + i], m->cols);
        float *to = out + t * stride;
        if (TILE >= 4 && tile == 4)
            rows_dot(F, m, first, n, 4, act, to, stride);
        else if (TILE >= 3 && tile == 3)
            rows_dot(F, m, first, n, 3, act, to, stride);
        else if (tile == 2)
            rows_dot(F, m, first, n, 2, act, to, stride);
        else
            rows_dot(F, m, first, n, 1, act, to, stride);
    }
}
