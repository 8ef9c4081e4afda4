/* Attention of one new token over what kv/layer.py stores: exact sinks, an exact ring, pages of codes.
 *
 * The token at position t = length sees positions below `sink` and t-recent..t exactly, and the rest from codes.
 * Without windows (sink = recent = 0) exact pages hold every token, the new one too. Nothing unseen is read: rows
 * beyond a sequence's end may be another's.
 */
#ifndef TM_ATTEND_H
#define TM_ATTEND_H

#include <stdint.h>

enum { TM_KV_F32, TM_KV_BF16, TM_KV_F16, TM_KV_Q8_0, TM_KV_TQ2, TM_KV_TQ3, TM_KV_TQ4, TM_KV_NONE,
       TM_KV_TCQ2, TM_KV_TCQ2_5, TM_KV_TCQ3, TM_KV_TCQ4, TM_KV_KINDS };
enum { TM_PAGE_TOKENS = 64, TM_HEAD_DIM = 256, TM_LEVELS = 16, TM_GROUP_QUERIES = 16 };

/* Keys or values of one layer. A vector of `codes` holds what the codec of that kind writes (turbomoe/kv/codecs). */
typedef struct {
    int kind;                  /* of pages */
    int exact_type;            /* a TM_TYPE: of sinks and ring */
    void *sinks, *ring;        /* [slots][kv_heads][sink or recent][dim] */
    void *codes;               /* [pages][kv_heads][TM_PAGE_TOKENS][bytes of a vector] */
    const void *scales;        /* fp16 [pages][kv_heads][TM_PAGE_TOKENS][1, or dim / 32 for Q8_0]; NULL for floats */
    const float *mean;         /* [kv_heads][dim]: what the codes lack; NULL for nothing */
    const float *scale;        /* [kv_heads][dim]: what they were divided by (keys only); NULL for ones */
    const float *turns;        /* [pages of a sequence][2 * pairs]: how the mean turns (turbomoe/kv/turns.py) */
    int pairs;                 /* channels i and i + pairs turn together; 0: the mean stays */
    float levels[TM_LEVELS];   /* of a TQ kind, by code */
    const float *codebook;     /* of a TCQ kind: [states][values of a step], by window */
} tm_kv_side;

typedef struct {
    int heads, kv_heads, dim, sink, recent;
    tm_kv_side keys, values;
    const float *signs;        /* [dim] of the rotation; looked at where a kind is rotated */
} tm_kv_layer;

/* One token's question to one layer. */
typedef struct {
    const tm_kv_layer *layer;
    long slot, length;         /* the sequence's slot, and its tokens before this one */
    const int64_t *pages;      /* its page table */
    const float *query;        /* [heads][dim], scaled */
    const float *rotated;      /* the same, scaled, in the rotated domain; NULL where keys are not rotated */
    const float *offset;       /* [heads]: score of what stays of the keys' mean; NULL for no mean */
    const float *waves;        /* [heads][2 * pairs]: times a page's `turns`, the score of what turns */
    const float *key, *value;  /* [kv_heads][dim]: the new token's, rounded as they are stored */
} tm_attend;

/* A running softmax of one query: the values arrive in two domains. */
typedef struct {
    float top, total, coded;   /* largest score, sum of weights, their sum over codes */
    float plain[TM_HEAD_DIM], rotated[TM_HEAD_DIM];
} tm_softmax;

static inline int tm_kv_trellis(int kind) { return kind >= TM_KV_TCQ2; }
static inline int tm_kv_rotated(int kind) { return (kind >= TM_KV_TQ2 && kind <= TM_KV_TQ4) || tm_kv_trellis(kind); }

/* Bytes of the codes of one vector. */
static inline long tm_kv_bytes(int kind, long dim)
{
    static const int half_bits[TM_KV_KINDS] = {64, 32, 32, 16, 4, 6, 8, 0, 4, 5, 6, 8};
    return dim * half_bits[kind] / 16;
}

/* How many keys lie in the sinks, in the ring and in pages, without the new one. Paged exactly: all, in pages. A
 * sliding window has no pages. */
typedef struct {
    long sinks, ring, coded;
} tm_seen;

static inline int tm_paged(const tm_kv_layer *l) { return l->sink == 0 && l->recent == 0; }

static inline tm_seen tm_keys_seen(const tm_attend *a)
{
    const tm_kv_layer *l = a->layer;
    long t = a->length, sinks = t < l->sink ? t : l->sink, oldest = t - l->recent;
    oldest = oldest < sinks ? sinks : oldest;
    return (tm_seen){sinks, t - oldest, l->keys.kind == TM_KV_NONE ? 0 : oldest - sinks};
}

#endif
