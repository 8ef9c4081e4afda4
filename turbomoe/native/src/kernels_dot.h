/* The dot functions of a level, one pair for each format. Compiled per level, after kernels_panel.h. */

/* By panels where there are tokens enough, else by rows. Which one is up to the tokens and the place of a row within
 * the block alone. */
INLINE void many_dot(const int F, const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out,
                     long stride)
{
    long by_panel = tokens < PANEL_TOKENS ? 0 : n / PANEL_ROWS * PANEL_ROWS;
    for (long i = 0; i < by_panel; i += PANEL_ROWS)
        panel_rows(F, m, first + i, x, tokens, out + i, stride);
    if (by_panel < n)
        dot(F, m, first + by_panel, n - by_panel, x, tokens, out + by_panel, stride);
}

#define DOT(F)                                                                                                         \
    static void dot_##F(const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out,          \
                        long stride)                                                                                   \
    {                                                                                                                  \
        dot(F, m, first, n, x, tokens, out, stride);                                                                   \
    }                                                                                                                  \
    static void many_##F(const tm_matrix *m, long first, long n, const void *const *x, int tokens, float *out,         \
                         long stride)                                                                                  \
    {                                                                                                                  \
        many_dot(F, m, first, n, x, tokens, out, stride);                                                              \
    }
DOT(TM_Q4_0) DOT(TM_Q4_1) DOT(TM_Q5_0) DOT(TM_Q5_1) DOT(TM_Q8_0) DOT(TM_IQ4_NL) DOT(TM_MXFP4)
DOT(TM_Q4_K) DOT(TM_Q5_K) DOT(TM_Q6_K)
