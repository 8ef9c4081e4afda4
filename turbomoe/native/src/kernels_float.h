/* Float weights (F16, BF16, F32) against float activations. Compiled per level, like kernels.h. */

INLINE vf load_weights(const int F, const uint8_t *codes, long i)
{
    return F == TM_F32 ? vf_load((const float *)(const void *)(codes + 4 * i))
           : F == TM_F16 ? vf_f16(codes + 2 * i) : vf_bf16(codes + 2 * i);
}

/* A row's last values one by one, through a buffer: reading past a row could meet a NaN. */
INLINE vf load_tail(const int F, const uint8_t *codes, long i, long n)
{
    const int size = F == TM_F32 ? 4 : 2;
    uint8_t rest[4 * LANES] = {0};
    memcpy(rest, codes + size * i, (size_t)(size * n));
    return load_weights(F, rest, 0);
}

INLINE float float_row(const int F, const uint8_t *w, const float *x, long cols)
{
    const int size = F == TM_F32 ? 4 : 2;
    vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    float tail[LANES] = {0};
    long i = 0;
    for (; i + 4 * LANES <= cols; i += 4 * LANES) {
        for (int j = 0; j < 4 * LANES * size; j += 64)
            PREFETCH(w + size * i + PREFETCH_BYTES + j);
        UNROLL for (int j = 0; j < 4; j++)
            sum[j] = vf_fma(load_weights(F, w, i + j * LANES), vf_load(x + i + j * LANES), sum[j]);
    }
    for (; i + LANES <= cols; i += LANES)
        sum[0] = vf_fma(load_weights(F, w, i), vf_load(x + i), sum[0]);
    if (i < cols) {
        memcpy(tail, x + i, (size_t)(cols - i) * sizeof(float));
        sum[1] = vf_fma(load_tail(F, w, i, cols - i), vf_load(tail), sum[1]);
    }
    return vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
}

#define DOT_FLOAT(F)                                                                                                   \
    static void dot_##F(const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out,          \
                        long stride)                                                                                   \
    {                                                                                                                  \
        for (long i = 0; i < n; i++)                                                                                   \
            for (int t = 0; t < tokens; t++)                                                                           \
                out[t * stride + i] = float_row(F, tm_row(m, TM_CODES, first + i), x[t], m->cols);              \
    }
DOT_FLOAT(TM_F16) DOT_FLOAT(TM_BF16) DOT_FLOAT(TM_F32)
