/* What decoding one token needs beside matrices: a norm, and attention over exact windows and codes. */

/* Root-mean-square norm (Zhang & Sennrich 2019): out = weight * x / sqrt(mean(x^2) + eps). */
static void norm(const float *x, const float *weight, float *out, long n, float eps)
{
    vf sum[2] = {vf_zero(), vf_zero()};
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++)
            sum[j] = vf_fma(vf_load(x + i + j * LANES), vf_load(x + i + j * LANES), sum[j]);
    float squares = vf_sum(vf_add(sum[0], sum[1]));
    for (; i < n; i++)
        squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

/* A stored vector, and the factor of what `vector` makes of it. */
typedef struct {
    int kind;
    const uint8_t *codes;
    const uint8_t *scales;
} stored;

INLINE stored exact_row(int type, const void *rows, long row, long dim)
{
    static const int kinds[TM_TYPES] = {TM_KV_F32, TM_KV_BF16, TM_KV_F16};
    return (stored){kinds[type], (const uint8_t *)rows + row * tm_kv_bytes(kinds[type], dim), NULL};
}

INLINE stored page_row(const tm_attend *a, const tm_kv_side *s, long head, long index)
{
    const tm_kv_layer *l = a->layer;
    long page = a->pages[index / TM_PAGE_TOKENS], scales = s->kind == TM_KV_Q8_0 ? l->dim / 32 : 1;
    long row = (page * l->kv_heads + head) * TM_PAGE_TOKENS + index % TM_PAGE_TOKENS;
    const uint8_t *factors = s->scales ? (const uint8_t *)s->scales + 2 * scales * row : NULL;
    return (stored){s->kind, (const uint8_t *)s->codes + row * tm_kv_bytes(s->kind, l->dim), factors};
}

/* Key or value `i` of those that are seen: sinks, ring in order of position, pages, the new one last. */
INLINE stored seen_row(const tm_attend *a, const tm_kv_side *s, const float *fresh, tm_seen n, long head, long i)
{
    const tm_kv_layer *l = a->layer;
    if (i < n.sinks)
        return exact_row(s->exact_type, s->sinks, (a->slot * l->kv_heads + head) * l->sink + i, l->dim);
    if (i < n.sinks + n.ring) {
        long position = a->length - n.ring + (i - n.sinks);
        return exact_row(s->exact_type, s->ring, (a->slot * l->kv_heads + head) * l->recent + position % l->recent, l->dim);
    }
    if (i < n.sinks + n.ring + n.coded)
        return page_row(a, s, head, i - n.sinks - n.ring);
    return exact_row(TM_TYPE_F32, fresh, head, l->dim);
}

/* Codes of the TQ kinds as bytes: turbomoe/kv/codecs/lloydmax.py says where the bits lie. */
INLINE void spread_codes(int kind, const uint8_t *codes, long dim, uint8_t *to)
{
    if (kind == TM_KV_TQ4) {
        for (long i = 0; i < dim / 2; i++)
            to[i] = codes[i] & 15, to[dim / 2 + i] = codes[i] >> 4;
        return;
    }
    long quarter = dim / 4, eighth = dim / 8;
    for (int k = 0; k < 4; k++)
        for (long i = 0; i < quarter; i++)
            to[k * quarter + i] = codes[i] >> 2 * k & 3;
    const uint8_t *high = codes + quarter;
    for (int k = 0; kind == TM_KV_TQ3 && k < 8; k++)
        for (long i = 0; i < eighth; i++)
            to[k * eighth + i] |= (uint8_t)((high[i] >> k & 1) << 2);
}

/* Between a stream of steps of `step` bits and the order in which its 32-bit words are stored: of all groups of the fewest
 * words that hold whole steps first all first ones (kv/codecs/windows.py). Streams of no whole groups stay as they are, and
 * so do those of five bits here. */
INLINE void reorder(const int step, const uint8_t *from, uint8_t *to, long bytes, const int store)
{
    const long words = step == 3 ? 3 : 1;
    long groups = bytes / (4 * words);
    if (words == 1 || bytes % (4 * words)) {
        memcpy(to, from, (size_t)bytes);
        return;
    }
    for (long g = 0; g < groups; g++)
        for (long w = 0; w < words; w++) {
            long in_stream = 4 * (g * words + w), stored_at = 4 * (w * groups + g);
            memcpy(to + (store ? stored_at : in_stream), from + (store ? in_stream : stored_at), 4);
        }
}

/* Values of overlapping windows of a circular stream, eight steps of `step` whole bytes at a time. `dim` is 32 or more. */
INLINE void follow(const int step, const int window, const int values, stored s, const float *codebook, long dim, float *to)
{
    uint8_t stream[TM_HEAD_DIM / 2 + 8];
    long bytes = dim / values * step / 8;
    reorder(step, s.codes, stream, bytes, 0);
    memcpy(stream + bytes, stream, 8);
    for (long at = 0; at < bytes; at += step, to += 8 * values) {
        uint64_t word;
        memcpy(&word, stream + at, sizeof word);
        UNROLL for (int i = 0; i < 8; i++) {
            const float *found = codebook + (word >> i * step & ((1u << window) - 1)) * (unsigned)values;
            UNROLL for (int v = 0; v < values; v++)
                to[i * values + v] = found[v];
        }
    }
}

enum { PLANES = 5 }; /* bits of a step of tcq2.5, which are stored apart (kv/codecs/windows.py) */

/* The bits of every byte, five apart. */
#define APART_1(n) ((n) & 1ull) | ((n) & 2ull) << 4 | ((n) & 4ull) << 8 | ((n) & 8ull) << 12
#define APART(n) (APART_1(n)) | (APART_1((n) >> 4)) << 20
#define APART_4(n) APART(n), APART(n + 1), APART(n + 2), APART(n + 3)
#define APART_16(n) APART_4(n), APART_4(n + 4), APART_4(n + 8), APART_4(n + 12)
#define APART_64(n) APART_16(n), APART_16(n + 16), APART_16(n + 32), APART_16(n + 48)
static const uint64_t bits_apart[256] = {APART_64(0), APART_64(64), APART_64(128), APART_64(192)};

/* Eight steps of five bits, from byte `at` of every plane of `bytes` bytes; the planes of a group are cut into words. */
INLINE uint64_t eight_steps(const uint8_t *codes, long bytes, long at)
{
    uint64_t found = 0;
    UNROLL for (int p = 0; p < PLANES; p++)
        found |= bits_apart[codes[p * bytes + at]] << p;
    return found;
}

/* `follow` for tcq2.5: from planes, where a vector has whole groups of 32 steps. */
INLINE void follow_planes(stored s, const float *codebook, long dim, float *to)
{
    if (dim % 64) {
        follow(PLANES, 10, 2, s, codebook, dim, to);
        return;
    }
    long bytes = dim / 16;
    uint64_t first = eight_steps(s.codes, bytes, 0), here = first;
    for (long at = 1; at <= bytes; at++, to += 16) {
        uint64_t next = at < bytes ? eight_steps(s.codes, bytes, at) : first, word = here | next << 40;
        UNROLL for (int i = 0; i < 8; i++)
            memcpy(to + 2 * i, codebook + 2 * (word >> PLANES * i & 1023), 2 * sizeof *to);
        here = next;
    }
}

INLINE void follow_any(stored s, const float *codebook, long dim, float *to)
{
    if (s.kind == TM_KV_TCQ2)
        follow(2, 9, 1, s, codebook, dim, to);
    else if (s.kind == TM_KV_TCQ2_5)
        follow_planes(s, codebook, dim, to);
    else if (s.kind == TM_KV_TCQ3)
        follow(3, 10, 1, s, codebook, dim, to);
    else
        follow(4, 10, 1, s, codebook, dim, to);
}

/* The vector as floats, but for the factor that is returned. `dim` is a multiple of 16. */
INLINE float vector(stored s, const tm_kv_side *side, long dim, float *to)
{
    uint8_t bytes[TM_HEAD_DIM];
    if (s.kind == TM_KV_F32) {
        memcpy(to, s.codes, (size_t)dim * sizeof *to);
        return 1.0f;
    }
    if (s.kind == TM_KV_BF16 || s.kind == TM_KV_F16) {
        for (long i = 0; i < dim; i += LANES)
            vf_store(to + i, s.kind == TM_KV_BF16 ? vf_bf16(s.codes + 2 * i) : vf_f16(s.codes + 2 * i));
        return 1.0f;
    }
    uint16_t half;
    if (s.kind == TM_KV_Q8_0) {
        for (long i = 0; i < dim; i += LANES) {
            memcpy(&half, s.scales + i / 32 * 2, sizeof half);
            vf_store(to + i, vf_mul(vf_i8(s.codes + i), vf_set(half_float(half))));
        }
        return 1.0f;
    }
    if (tm_kv_trellis(s.kind))
        follow_any(s, side->codebook, dim, to);
    else {
        spread_codes(s.kind, s.codes, dim, bytes);
        for (long i = 0; i < dim; i += LANES)
            vf_store(to + i, vf_levels(side->levels, bytes + i));
    }
    memcpy(&half, s.scales, sizeof half);
    return half_float(half);
}

INLINE float inner(const float *a, const float *b, long dim)
{
    vf sum[2] = {vf_zero(), vf_zero()};
    long i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        for (int j = 0; j < 2; j++)
            sum[j] = vf_fma(vf_load(a + i + j * LANES), vf_load(b + i + j * LANES), sum[j]);
    for (; i < dim; i += LANES)
        sum[0] = vf_fma(vf_load(a + i), vf_load(b + i), sum[0]);
    return vf_sum(vf_add(sum[0], sum[1]));
}

INLINE void add_scaled(float *to, const float *x, float factor, long dim)
{
    for (long i = 0; i < dim; i += LANES)
        vf_store(to + i, vf_fma(vf_set(factor), vf_load(x + i), vf_load(to + i)));
}

INLINE void shrink(tm_softmax *s, float factor, long dim)
{
    s->total *= factor, s->coded *= factor;
    for (long i = 0; i < dim; i++)
        s->plain[i] *= factor, s->rotated[i] *= factor;
}

enum { BLOCK = 32 };

/* Turn scores into weights against the largest so far (Milakov & Gimelshein 2018). */
INLINE void weigh(tm_softmax *s, float *scores, long n, long dim)
{
    float top = s->top;
    for (long i = 0; i < n; i++)
        top = scores[i] > top || scores[i] != scores[i] ? scores[i] : top;
    if (top != s->top)
        shrink(s, s->total == 0.0f ? 0.0f : exp_fast(s->top - top), dim);
    s->top = top;
    for (long i = 0; i < n; i++)
        scores[i] = exp_fast(scores[i] - top);
    for (long i = 0; i < n; i++)
        s->total += scores[i];
}

/* The score of the mean of the keys in page `page` of the sequence, for each query of `head`. */
static void page_scores(const tm_attend *a, long head, long page, float *to)
{
    const tm_kv_layer *l = a->layer;
    long group = l->heads / l->kv_heads, width = 2 * l->keys.pairs;
    for (long g = 0; g < group; g++) {
        const float *waves = a->waves + (head * group + g) * width, *turns = l->keys.turns + page * width;
        to[g] = a->offset[head * group + g];
        for (long i = 0; i < width; i++)
            to[g] += waves[i] * turns[i];
    }
}

/* Keys [begin, end) of `head`, counted as seen_row does, into the softmaxes of its queries. */
static void attend(const tm_attend *a, long head, long begin, long end, tm_softmax *states)
{
    const tm_kv_layer *l = a->layer;
    long group = l->heads / l->kv_heads, dim = l->dim;
    tm_seen n = tm_keys_seen(a);
    long first_coded = n.sinks + n.ring, last_coded = first_coded + n.coded;
    float line[TM_HEAD_DIM + LANES], scores[TM_GROUP_QUERIES][BLOCK], of_mean[TM_GROUP_QUERIES];
    long page = -1;
    for (long start = begin; start < end; start += BLOCK) {
        long count = end - start < BLOCK ? end - start : BLOCK;
        for (long i = 0; i < count; i++) {
            int coded = start + i >= first_coded && start + i < last_coded;
            float factor = vector(seen_row(a, &l->keys, a->key, n, head, start + i), &l->keys, dim, line);
            long here = coded ? (start + i - first_coded) / TM_PAGE_TOKENS : -1;
            if (a->offset && coded && here != page)
                page_scores(a, head, page = here, of_mean);
            const float *q = (coded && a->rotated ? a->rotated : a->query) + head * group * dim;
            for (long g = 0; g < group; g++)
                scores[g][i] = inner(q + g * dim, line, dim) * factor
                               + (coded && a->offset ? of_mean[g] : 0.0f);
        }
        for (long g = 0; g < group; g++)
            weigh(&states[g], scores[g], count, dim);
        for (long i = 0; i < count; i++) {
            int coded = start + i >= first_coded && start + i < last_coded;
            float factor = vector(seen_row(a, &l->values, a->value, n, head, start + i), &l->values, dim, line);
            for (long g = 0; g < group; g++) {
                float *to = coded && tm_kv_rotated(l->values.kind) ? states[g].rotated : states[g].plain;
                add_scaled(to, line, scores[g][i] * factor, dim);
                states[g].coded += coded ? scores[g][i] : 0.0f;
            }
        }
    }
}
