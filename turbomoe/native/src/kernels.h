/* The row kernels, written once and compiled for every dispatch level.
 *
 * A level_*.c file includes one simd_*.h, which defines LANES (4, 8 or 16), TILE and PANEL_TILE (tokens at a time, as many as
 * registers hold), the types vf (LANES floats), vi (LANES int32) and vb (4 * LANES bytes), and primitives on them.
 *
 * A step is LANES groups of 32 values. It has 4 blocks; a block is one vb of first halves (value 0..15 of each of
 * its LANES / 4 groups) and one vb of second halves. So every group owns 4 int32 lanes of a dot product, and a
 * vector of LANES group factors is put in order by vf_order, once, and then spread to them by vf_spread(p, block).
 * Rows may end inside a step: activations are zero there, and what the weights read is finite (formats.c).
 */

/* Measured: the second-level cache, 8 KiB ahead. Into the first level, or nearer, halves the read rate. */
#define PREFETCH_BYTES 8192
#define PREFETCH(p) __builtin_prefetch((p), 0, 2)

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
    if (f->scale == TM_SCALE_F16)
        s.scale = vf_f16(w.scales + 2 * g);
    else if (f->scale == TM_SCALE_E8M0)
        s.scale = vf_mul(vf_e8m0(w.scales + g), vf_set(0.5f));
    else if (f->scale == TM_SCALE_TWO)
        s.scale = vf_mul(vf_u8(w.scales + g), vf_super(w.supers + g / 8 * 4, 4));
    else {
        vf super = vf_super(w.supers + g / 8 * 2, 2);
        s.scale = vf_mul(vf_i8(w.scales + g), super);
        s.scale2 = vf_mul(vf_i8(w.scales + m->cols / TM_GROUP + g), super);
    }
    if (f->min == TM_MIN_F16)
        s.less = vf_mul(vf_f16(w.mins + 2 * g), vf_set(-1.0f));
    else if (f->min == TM_MIN_TWO)
        s.less = vf_mul(vf_u8(w.mins + g), vf_super(w.supers + g / 8 * 4 + 2, 4));
    return s;
}

/* Does this format's kernel see signed codes? Then a level may have moved them up by SIGNED_ZERO. */
#define SIGNED(F) ((F) == TM_IQ4_NL || tm_formats[F].code_bits == 8)
#define ZERO(F) (float)(SIGNED(F) ? SIGNED_ZERO : tm_formats[F].zero)

/* The codes of block `b` of the step at group `g`: first halves in lo, second halves in hi. */
INLINE void codes(const int F, const tm_matrix *m, row_at w, long g, int b, vb *lo, vb *hi)
{
    const tm_format *f = &tm_formats[F];
    const uint8_t *at = w.codes + g * 16 + b * 4 * LANES;
    if (f->code_bits == 8) {
        *lo = vb_signed(vb_load(at));
        *hi = vb_signed(vb_load(at + m->cols / 2));
        return;
    }
    vb both = vb_load(at), lo_bits, hi_bits;
    *lo = vb_low(both);
    *hi = vb_high(both);
    if (f->table) {
        const int8_t *table = F == TM_MXFP4 ? tm_table_mxfp4 : tm_table_iq4nl;
        *lo = vb_table(table, *lo);
        *hi = vb_table(table, *hi);
        if (SIGNED(F)) {
            *lo = vb_signed(*lo);
            *hi = vb_signed(*hi);
        }
    }
    if (f->high_bits == 1)
        vb_high1(w.high, g, b, &lo_bits, &hi_bits);
    if (f->high_bits == 2)
        vb_high2(w.high, g, b, &lo_bits, &hi_bits);
    if (f->high_bits) {
        *lo = vb_or(*lo, lo_bits);
        *hi = vb_or(*hi, hi_bits);
    }
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

/* Products of one block with one activation, added to the accumulator `sum`. */
INLINE vf block_dot(const int F, vb lo, vb hi, tm_act x, long g, int b, vf p, vf p2, vf sum)
{
    const int8_t *at = x.first + g * 16 + b * 4 * LANES, *at2 = x.second + g * 16 + b * 4 * LANES;
    vb xlo = vb_load(at), xhi = vb_load(at2);
    if (tm_formats[F].scale == TM_SCALE_HALF) {
        sum = vf_fma(vf_int(vi_dot(lo, xlo)), vf_spread(p, b), sum);
        return vf_fma(vf_int(vi_dot(hi, xhi)), vf_spread(p2, b), sum);
    }
    vi both = SIGNED(F) ? vi_dot2_signed(lo, hi, xlo, xhi) : vi_dot2(lo, hi, xlo, xhi);
    return vf_fma(vf_int(both), vf_spread(p, b), sum);
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

/* One step of one row against T activations. Two accumulators each, whatever T, so that a token's result does not
 * depend on how many tokens came with it. */
INLINE void step(const int F, const tm_matrix *m, row_at w, long g, int blocks, const int T, const tm_act *x,
                 vf (*sum)[2])
{
    step_factors s = factors(F, m, w, g);
    vf p[4], p2[4];
    UNROLL for (int t = 0; t < T; t++) {
        p[t] = vf_order(vf_mul(s.scale, vf_load(x[t].scale + g)));
        p2[t] = vf_order(vf_mul(s.scale2, vf_load(x[t].scale + g)));
        sum[t][0] = step_less(F, s, x[t], g, sum[t][0]);
    }
    UNROLL for (int b = 0; b < 4; b++) {
        vb lo, hi;
        if (b >= blocks)
            break;
        codes(F, m, w, g, b, &lo, &hi);
        UNROLL for (int t = 0; t < T; t++)
            sum[t][b % 2] = block_dot(F, lo, hi, x[t], g, b, p[t], p2[t], sum[t][b % 2]);
    }
}

INLINE void row_dot(const int F, const tm_matrix *m, long r, long ahead, const int T, const tm_act *x, float *out,
                    long stride)
{
    row_at w = row_of(m, r);
    long groups = m->cols / TM_GROUP, g = 0;
    vf sum[4][2];
    UNROLL for (int t = 0; t < T; t++)
        sum[t][0] = sum[t][1] = vf_zero();
    prefetch_row(F, m, w, ahead);
    for (; g + LANES <= groups; g += LANES) {
        prefetch_step(F, m, w, g);
        step(F, m, w, g, 4, T, x, sum);
    }
    if (g < groups)
        step(F, m, w, g, (int)(groups - g + LANES / 4 - 1) / (LANES / 4), T, x, sum);
    UNROLL for (int t = 0; t < T; t++)
        out[t * stride] = vf_sum(vf_add(sum[t][0], sum[t][1]));
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
