/* Viterbi's search over a trellis. What is added to what in which order is the reference's (kv/trellis_search.py): the
 * paths are its own, bit for bit, at every level.
 *
 * A state is a window of bits; the states that share all but the `step` lowest, which the next step drops, are a group. All
 * that a step needs of the past is the least cost in each group: they fit in registers. They are kept for all steps, and
 * the dropped bits of the few groups on the path are looked for on the way back.
 */

enum { HALF_SPAN = 32, TILE_GROUPS = 8 * LANES };
#define UNREACHABLE (3.402823466e38f / 4)

/* By group * 2^step + dropped, to by dropped * groups / 2^step + group: the index turns right by `step` bits. */
INLINE void by_dropped(const int step, const int groups, const float *from, float *to)
{
    const int n = groups / LANES;
    vf r[TM_TRELLIS_GROUPS / LANES], turned[TM_TRELLIS_GROUPS / LANES];
    UNROLL for (int i = 0; i < n; i++)
        r[i] = vf_load(from + i * LANES);
    UNROLL for (int bit = 0; bit < step; bit++) {
        UNROLL for (int i = 0; i < n / 2; i++)
            vf_unzip(r[2 * i], r[2 * i + 1], &turned[i], &turned[n / 2 + i]);
        UNROLL for (int i = 0; i < n; i++)
            r[i] = turned[i];
    }
    UNROLL for (int i = 0; i < n; i++)
        vf_store(to + i * LANES, r[i]);
}

/* LANES costs from place `at` on of those with dropped bits `b`, which repeat after `period`. */
INLINE vf repeated(const float *costs, const int period, int b, long at)
{
    if (period >= LANES)
        return vf_load(costs + b * period + at % period);
    return period == 4 ? vf_quad(costs + 4 * b) : vf_set(costs[b]);
}

/* next[j] = least over dropped bits b of best[(j * 2^step + b) mod groups] + (x - value of state j * 2^step + b)^2. */
INLINE void trellis_step(
    const int step, const int groups, const int values, const float *table, const float *x, const float *best, float *next)
{
    const int many = 1 << step, period = groups / many, tile = groups < TILE_GROUPS ? groups : TILE_GROUPS;
    float turned[TM_TRELLIS_GROUPS];
    const float *costs = period == 1 ? best : turned;
    vf here[2] = {vf_set(x[0]), vf_set(x[values - 1])};
    if (period > 1)
        by_dropped(step, groups, best, turned);
    for (int first = 0; first < groups; first += tile) {
        vf least[8];
        for (int b = 0; b < many; b++)
            UNROLL for (int i = 0; i < tile / LANES; i++) {
                long at = first + i * LANES;
                vf total = repeated(costs, period, b, at);
                UNROLL for (int v = 0; v < values; v++) {
                    vf off = vf_sub(here[v], vf_load(table + (v * many + b) * groups + at));
                    total = vf_add(total, vf_mul(off, off));
                }
                least[i] = b ? vf_min(least[i], total) : total;
            }
        UNROLL for (int i = 0; i < tile / LANES; i++)
            vf_store(next + first + i * LANES, least[i]);
    }
}

/* The state of group `j` with the least cost after a step over `x` that started from `best`; the lowest of several. */
INLINE int state_of(
    const int step, const int groups, const int values, const float *codebook, const float *x, const float *best, int j)
{
    const int many = 1 << step;
    int first = j * many, found = 0;
    float costs[32];
    best += first & (groups - 1);
    for (int b = 0; b < many; b++) {
        costs[b] = best[b];
        for (int v = 0; v < values; v++) {
            float off = x[v] - codebook[v * groups * many + first + b];
            costs[b] += off * off;
        }
    }
    for (int b = 1; b < many; b++)
        found = costs[b] < costs[found] ? b : found;
    return first + found;
}

/* The windows of all steps. `history` holds best costs by group, [steps + 1 or 2 * HALF_SPAN + 1][groups]. */
INLINE void best_circle(
    const int step, const int groups, const int values, const tm_trellis *job, const float *x, float *history, int *windows)
{
    int steps = job->dim / values;
    const float *around[2 * HALF_SPAN];
    for (int i = 0; i < 2 * HALF_SPAN; i++)
        around[i] = x + (i + HALF_SPAN * (steps - 1)) % steps * values;
    memset(history, 0, (size_t)groups * sizeof *history);
    for (int i = 0; i < 2 * HALF_SPAN; i++)
        trellis_step(step, groups, values, job->by_dropped, around[i], history + i * groups, history + (i + 1) * groups);
    const float *last = history + 2 * HALF_SPAN * groups;
    int group = 0;
    for (int j = 1; j < groups; j++)
        group = last[j] < last[group] ? j : group;
    int state = 0;
    for (int i = 2 * HALF_SPAN - 1; i >= HALF_SPAN - 1; i--) {
        state = state_of(step, groups, values, job->codebook, around[i], history + i * groups, group);
        group = state & (groups - 1);
    }
    int boundary = state;
    for (int j = 0; j < groups; j++)
        history[j] = j == boundary >> step ? 0.0f : UNREACHABLE;
    for (int i = 0; i < steps; i++)
        trellis_step(step, groups, values, job->by_dropped, x + i * values, history + i * groups, history + (i + 1) * groups);
    windows[steps - 1] = boundary;
    for (int i = steps - 2; i >= 0; i--)
        windows[i] = state_of(step, groups, values, job->codebook, x + i * values, history + i * groups,
                              windows[i + 1] & (groups - 1));
}

/* Sum by halves, in place: the order of kv/codecs/scales.py. */
INLINE float tree_sum(float *x, int n)
{
    for (int half = n / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

INLINE float norm_of(const float *x, int n)
{
    float squares[TM_TRELLIS_DIM] = {0};
    for (int i = 0; i < n; i++)
        squares[i] = x[i] * x[i];
    return sqrtf(tree_sum(squares, n));
}

/* `x` as coordinates of unit variance, zeros where it has none; its largest magnitude, and its norm over that. */
INLINE float spread_out(const float *x, int n, float *spread, float *norm)
{
    float peak = 0.0f;
    for (int i = 0; i < n; i++)
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
    for (int i = 0; i < n; i++)
        spread[i] = x[i] / (peak > 0.0f ? peak : 1.0f);
    *norm = norm_of(spread, n);
    float factor = 1.0f / *norm * sqrtf((float)n);
    for (int i = 0; i < n; i++)
        spread[i] = *norm > 0.0f ? spread[i] * factor : 0.0f;
    return peak;
}

INLINE void pack_steps(const int step, const int *windows, int steps, uint8_t *codes)
{
    uint8_t stream[TM_TRELLIS_DIM], *at = stream;
    uint32_t bits = 0;
    for (int i = 0, filled = 0; i < steps; i++) {
        bits |= (uint32_t)(windows[i] & ((1 << step) - 1)) << filled;
        for (filled += step; filled >= 8; filled -= 8, bits >>= 8)
            *at++ = (uint8_t)bits;
    }
    reorder(step, stream, codes, at - stream, 1);
}

INLINE void pack_planes(const int *windows, int steps, uint8_t *codes)
{
    for (int p = 0; p < PLANES; p++)
        for (int i = 0; i < steps; i += 8) {
            int byte = 0;
            for (int j = 0; j < 8; j++)
                byte |= (windows[i + j] >> p & 1) << j;
            *codes++ = (uint8_t)byte;
        }
}

INLINE void encode_one(
    const int step, const int groups, const int values, const tm_trellis *job, long row, float *history)
{
    int dim = job->dim, steps = dim / values, windows[TM_TRELLIS_DIM];
    float spread[TM_TRELLIS_DIM], norm;
    float peak = spread_out(job->x + row * dim, dim, spread, &norm);
    best_circle(step, groups, values, job, spread, history, windows);
    uint8_t *codes = job->codes + row * (steps * step / 8);
    if (step == PLANES && steps % 32 == 0)
        pack_planes(windows, steps, codes);
    else
        pack_steps(step, windows, steps, codes);
    float chosen[TM_TRELLIS_DIM];
    for (int i = 0; i < steps; i++)
        for (int v = 0; v < values; v++)
            chosen[i * values + v] = job->codebook[(v * groups << step) + windows[i]];
    float scale = peak * (norm / norm_of(chosen, dim));
    scale = scale > 65504.0f ? 65504.0f : scale;
    narrow_floats(TM_TYPE_F16, &scale, job->scales + row, 1);
}

#define ENCODE(STEP, GROUPS, VALUES)                                                                                   \
    for (long row = begin; row < end; row++)                                                                           \
    encode_one(STEP, GROUPS, VALUES, job, row, history)

static void encode_trellis(const tm_trellis *job, long begin, long end)
{
    float history[(TM_TRELLIS_DIM + 1) * TM_TRELLIS_GROUPS];
    if (job->kind == TM_TCQ2)
        ENCODE(2, 128, 1);
    else if (job->kind == TM_TCQ2_5)
        ENCODE(5, 32, 2);
    else if (job->kind == TM_TCQ3)
        ENCODE(3, 128, 1);
    else
        ENCODE(4, 64, 1);
}
