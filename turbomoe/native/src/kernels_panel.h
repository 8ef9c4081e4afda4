/* Many tokens: weights are unpacked once into panels that cost least per token. Compiled per level, after kernels.h.
 *
 * A panel is LANES rows by PANEL_GROUPS groups. Its codes are interleaved so that a vector holds four neighbouring
 * values of every row: against four values of a token, broadcast, each int32 lane sums for a row of its own, and a
 * group of 32 costs one conversion instead of one per block. A token's sums are added in another order than by the
 * row kernels, so that results differ from theirs in the last bits.
 */
enum {
    PANEL_GROUPS = 16,
    PANEL_VECTORS = 2,                      /* of LANES rows each */
    PANEL_ROWS = PANEL_VECTORS * LANES,
    PANEL_TOKENS = 5                       /* from so many on unpacking pays (measured with AVX2) */
};

typedef struct {
    vb codes[PANEL_VECTORS][PANEL_GROUPS][8];
    vf scale[PANEL_VECTORS][PANEL_GROUPS], scale2[PANEL_VECTORS][PANEL_GROUPS];
    vf less[PANEL_VECTORS][PANEL_GROUPS], less2[PANEL_VECTORS][PANEL_GROUPS];
} panel;

/* Block `b` of the step at group `g`, all rows, into groups from `to` on. */
INLINE void unpack_block(const int F, const tm_matrix *m, const row_at *w, long g, int b, vb (*to)[8])
{
    vb lo[LANES], hi[LANES];
    UNROLL for (int l = 0; l < LANES; l++)
        codes(F, m, w[l], g, b, &lo[l], &hi[l]);
    vb_transpose(lo);
    vb_transpose(hi);
    UNROLL for (int q = 0; q < LANES / 4; q++)
        UNROLL for (int j = 0; j < 4; j++) {
            to[q][j] = lo[4 * q + j];
            to[q][4 + j] = hi[4 * q + j];
        }
}

/* Factors of LANES groups of all rows, turned so that a vector holds one group of every row. */
INLINE void unpack_factors(const int F, const tm_matrix *m, const row_at *w, long g, int v, panel *p, long to)
{
    const int half = tm_formats[F].scale == TM_SCALE_HALF;
    vf scale[LANES], scale2[LANES], less[LANES];
    UNROLL for (int l = 0; l < LANES; l++) {
        step_factors s = factors(F, m, w[l], g);
        scale[l] = s.scale, scale2[l] = s.scale2, less[l] = s.less;
    }
    vf_transpose(scale);
    if (half)
        vf_transpose(scale2);
    if (tm_formats[F].min)
        vf_transpose(less);
    const vf zero = vf_set(ZERO(F));
    for (int i = 0; i < LANES; i++) {
        p->scale[v][to + i] = scale[i];
        p->less[v][to + i] = tm_formats[F].min ? less[i] : vf_mul(scale[i], zero);
        if (!half)
            continue;
        p->scale2[v][to + i] = scale2[i];
        p->less2[v][to + i] = vf_fnma(scale[i], zero, vf_mul(scale2[i], zero));
    }
}

INLINE void unpack_panel(const int F, const tm_matrix *m, const row_at *w, long g, long groups, int v, panel *p)
{
    for (long at = 0; at < groups; at += LANES) {
        unpack_factors(F, m, w, g + at, v, p, at);
        for (int b = 0; b < 4 && at + b * LANES / 4 < groups; b++)
            unpack_block(F, m, w, g + at, b, p->codes[v] + at + b * LANES / 4);
    }
}

/* Products of `count` vectors of codes from `w` on with values `x[t]` of T tokens, added to `part`. Every vector of
 * codes is loaded once for all tokens, every four values once for all rows. Two at a time: unrolled further, the
 * compiler loads ahead and spills. */
INLINE void panel_run(const int F, const vb *w, const int count, const int T, const int8_t *const *x,
                      va (*part)[PANEL_TILE])
{
    _Pragma("GCC unroll 2") for (int j = 0; j < count; j++) {
        vb rows[PANEL_VECTORS];
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            rows[v] = w[v * 8 * PANEL_GROUPS + j];
        UNROLL for (int t = 0; t < T; t++) {
            vb four = vb_four(x[t] + 4 * LANES * j);
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                part[v][t] = va_add(part[v][t], rows[v], four, SIGNED(F));
        }
    }
}

/* Sums over group `i`, or over its halves apart. */
INLINE void panel_sums(const int F, const panel *p, long i, const int T, const tm_act *act, long g,
                       vi (*sum)[PANEL_TILE], vi (*sum2)[PANEL_TILE])
{
    const int half = tm_formats[F].scale == TM_SCALE_HALF;
    va part[PANEL_VECTORS][PANEL_TILE];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
            part[v][t] = va_zero();
            sum[v][t] = sum2[v][t] = vi_zero();
        }
    UNROLL for (int from = 0; from < 8; from += SPAN(F)) {
        const int8_t *x[PANEL_TILE];
        UNROLL for (int t = 0; t < T; t++)
            x[t] = act[t].values + act_at(g) + 4 * LANES * from;
        panel_run(F, &p->codes[0][i][from], SPAN(F), T, x, part);
        vi (*to)[PANEL_TILE] = half && from >= 4 ? sum2 : sum;
        UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
                to[v][t] = vi_add(to[v][t], vi_part(part[v][t], SIGNED(F)));
                part[v][t] = va_zero();
            }
    }
}

/* One group of the panel against T tokens. */
INLINE void panel_group(const int F, const panel *p, long i, const int T, const tm_act *x, long g,
                        vf (*out)[PANEL_TILE])
{
    const int half = tm_formats[F].scale == TM_SCALE_HALF;
    vi sum[PANEL_VECTORS][PANEL_TILE], sum2[PANEL_VECTORS][PANEL_TILE];
    panel_sums(F, p, i, T, x, g, sum, sum2);
    UNROLL for (int t = 0; t < T; t++) {
        const vf scale = vf_set(x[t].scale[scale_at(g)]), all = vf_set(x[t].sum[g]), second = vf_set(x[t].sum2[g]);
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
            out[v][t] = vf_fma(vf_int(sum[v][t]), vf_mul(p->scale[v][i], scale), out[v][t]);
            if (half) {
                out[v][t] = vf_fma(vf_int(sum2[v][t]), vf_mul(p->scale2[v][i], scale), out[v][t]);
                out[v][t] = vf_fnma(p->less2[v][i], second, out[v][t]);
            }
            if (tm_formats[F].min || ZERO(F) != 0)
                out[v][t] = vf_fnma(p->less[v][i], all, out[v][t]);
        }
    }
}

/* A panel against T tokens; what earlier panels of these rows gave is in `out`, unless this is the first. */
INLINE void panel_tile(const int F, const panel *p, long g, long groups, const int T, const tm_act *x, float *out,
                       long stride)
{
    vf sum[PANEL_VECTORS][PANEL_TILE];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            sum[v][t] = g ? vf_load(out + t * stride + v * LANES) : vf_zero();
    for (long i = 0; i < groups; i++)
        panel_group(F, p, i, T, x, g + i, sum);
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            vf_store(out + t * stride + v * LANES, sum[v][t]);
}

/* The largest tile that `tokens` fill. */
INLINE int panel_tile_of(int tokens)
{
    return tokens >= PANEL_TILE ? PANEL_TILE : tokens >= 3 ? 3 : tokens;
}

INLINE void panel_tokens(const int F, const panel *p, const tm_matrix *m, long g, long groups, const void *const *x,
                         int tokens, float *out, long stride)
{
    for (int t = 0, tile; t < tokens; t += tile) {
        tm_act act[PANEL_TILE];
        tile = panel_tile_of(tokens - t);
        for (int i = 0; i < tile; i++)
            act[i] = tm_act_at((void *)(uintptr_t)x[t + i], m->cols);
        float *to = out + t * stride;
        if (PANEL_TILE > 3 && tile == PANEL_TILE)
            panel_tile(F, p, g, groups, PANEL_TILE, act, to, stride);
        else if (tile == 3)
            panel_tile(F, p, g, groups, 3, act, to, stride);
        else if (tile == 2)
            panel_tile(F, p, g, groups, 2, act, to, stride);
        else
            panel_tile(F, p, g, groups, 1, act, to, stride);
    }
}

/* Rows [first, first + PANEL_ROWS) against all tokens. */
INLINE void panel_rows(const int F, const tm_matrix *m, long first, const void *const *x, int tokens, float *out,
                       long stride)
{
    panel p;
    row_at w[PANEL_ROWS];
    long all = m->cols / TM_GROUP;
    for (int l = 0; l < PANEL_ROWS; l++)
        w[l] = row_of(m, first + l);
    for (long g = 0; g < all; g += PANEL_GROUPS) {
        long groups = all - g < PANEL_GROUPS ? all - g : PANEL_GROUPS;
        for (int v = 0; v < PANEL_VECTORS; v++)
            unpack_panel(F, m, w + v * LANES, g, groups, v, &p);
        panel_tokens(F, &p, m, g, groups, x, tokens, out, stride);
    }
}
