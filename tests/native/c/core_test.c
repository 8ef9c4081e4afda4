/* The core's own tests, to be run under sanitizers: random shapes, formats and routings at every level against
 * naive.h, refusals, many threads on one pool and on several, fork, and the bell. Exits with 1 at the first failure,
 * which it names.
 * Usage: core_test CASES ROUNDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bell.h"
#include "bulk.h"
#include "linear.h"
#include "naive.h"
#include "trellis.h"

#define CHECK(ok, ...)                                                                                                 \
    do {                                                                                                               \
        if (!(ok)) {                                                                                                   \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t state = 88172645463325252u;
static uint32_t any(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}
static int below(int n) { return (int)(any() % (uint32_t)n); }
static float real(void) { return (float)any() / 2147483648.0f - 1.0f; }

/* ---- random weights ---- */

static void fill_half(uint8_t *p) { p[0] = (uint8_t)any(), p[1] = (uint8_t)(0x18 + below(8)); }

static void fill_block(int format, uint8_t *b, int bytes)
{
    for (int i = 0; i < bytes; i++)
        b[i] = (uint8_t)any();
    if (format == TM_MXFP4)
        b[0] = (uint8_t)(118 + below(5));
    else if (format == TM_Q6_K)
        fill_half(b + 208);
    else if (format == TM_F32 || format == TM_BF16)
        b[bytes - 1] = 0x3c, b[bytes - 2] &= 0x7f;
    else
        fill_half(b);
    if (format == TM_Q4_1 || format == TM_Q5_1 || format == TM_Q4_K || format == TM_Q5_K)
        fill_half(b + 2);
}

static void pack_random(tm_pool *pool, int format, int rows, int cols, void *blob)
{
    const tm_format *f = &tm_formats[format];
    size_t blocks = (size_t)rows * (size_t)(cols / f->block);
    uint8_t *raw = malloc(blocks * (size_t)f->block_bytes);
    for (size_t b = 0; b < blocks; b++)
        fill_block(format, raw + b * (size_t)f->block_bytes, f->block_bytes);
    CHECK(tm_pack(pool, format, rows, cols, raw, blob) == TM_OK, "packing %s %d x %d", f->name, rows, cols);
    free(raw);
}

static int cols_for(int format, int most) { return tm_formats[format].block * (1 + below(most / tm_formats[format].block)); }

/* An allocation that ends where the blob ends: a read past it is seen. */
static void *blob_of(size_t bytes) { return aligned_alloc(64, bytes); }

static float *floats(long n)
{
    float *x = malloc(sizeof *x * (size_t)n);
    for (long i = 0; i < n; i++)
        x[i] = real();
    return x;
}

static double distance(const float *a, const float *b, long n)
{
    double difference = 0, size = 1e-30;
    for (long i = 0; i < n; i++) {
        difference += (double)(a[i] - b[i]) * (a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(difference / size);
}

/* ---- linear layers ---- */

static void test_linear(tm_pool *pool, int format, int tokens, int many)
{
    int rows = 1 + below(70), cols = cols_for(format, below(8) ? 700 : 2500);
    tm_matrix m;
    void *blob = blob_of(tm_matrix_view(&m, format, rows, cols, NULL));
    pack_random(pool, format, rows, cols, blob);
    tm_matrix_view(&m, format, rows, cols, blob);
    float *x = floats((long)tokens * cols), *bias = floats(rows), *out = floats((long)tokens * rows);
    float *want = floats((long)tokens * rows);
    tm_linear_call call = {.work = tm_linear_work_new(pool, cols, tokens), .count = 1, .tokens = tokens, .x = x,
                           .many = many};
    call.matrices[0] = (tm_linear){format, rows, cols, blob, bias, out, rows};
    tm_linear_run(&call);
    CHECK(call.status == TM_OK, "linear status %d", call.status);
    double *values = naive_matrix(&m);
    for (int t = 0; t < tokens; t++)
        naive_linear(&m, values, x + (long)t * cols, bias, want + (long)t * rows);
    free(values);
    double error = distance(out, want, (long)tokens * rows);
    CHECK(error < 1e-5, "%s %d x %d, %d tokens: error %g", tm_formats[format].name, rows, cols, tokens, error);
    tm_linear_work_free(call.work);
    free(blob), free(x), free(bias), free(out), free(want);
}

/* ---- experts ---- */

typedef struct {
    tm_experts layer;
    void *blobs[8];
    int rows, top;
    float *hidden, *weights, *out, *want;
    int64_t *ids;
} expert_case;

static void make_layer(tm_pool *pool, expert_case *c)
{
    tm_experts *l = &c->layer;
    tm_matrix m;
    int format = below(TM_FORMATS), down = below(TM_FORMATS);
    int step = tm_formats[format].block == 256 || tm_formats[down].block == 256 ? 256 : 32;
    *l = (tm_experts){.hidden = step * (1 + below(step == 32 ? 9 : 2)), .width = step * (1 + below(step == 32 ? 9 : 2)),
                      .experts = 1 + below(8),
                      .gate_format = format, .up_format = format, .down_format = down, .gate = below(TM_GATES),
                      .alpha = 1.702f, .limit = 7, .blobs = (const void *const *)c->blobs};
    l->up_at = (int64_t)tm_matrix_view(&m, format, l->width, l->hidden, NULL);
    l->down_at = 2 * l->up_at;
    l->down_bias_at = l->down_at + (int64_t)tm_matrix_view(&m, down, l->hidden, l->width, NULL);
    l->gate_bias_at = l->up_bias_at = -1;
    for (int e = 0; e < l->experts; e++) {
        char *blob = c->blobs[e] = blob_of((size_t)(l->down_bias_at + 4 * l->hidden));
        pack_random(pool, format, l->width, l->hidden, blob);
        pack_random(pool, format, l->width, l->hidden, blob + l->up_at);
        pack_random(pool, down, l->hidden, l->width, blob + l->down_at);
        for (int i = 0; i < l->hidden; i++)
            ((float *)(void *)(blob + l->down_bias_at))[i] = real();
    }
}

static void make_case(tm_pool *pool, expert_case *c, int rows)
{
    make_layer(pool, c);
    long pairs, values = (long)rows * c->layer.hidden;
    naive_values seen[8] = {0};
    c->rows = rows, c->top = 1 + below(c->layer.experts);
    pairs = (long)rows * c->top;
    c->hidden = floats(values), c->out = floats(values), c->want = calloc((size_t)values, sizeof(float));
    c->weights = floats(pairs), c->ids = malloc(sizeof(int64_t) * (size_t)pairs);
    float *term = malloc(sizeof(float) * (size_t)c->layer.hidden);
    for (long p = 0; p < pairs; p++) {
        long row = p / c->top * c->layer.hidden;
        c->ids[p] = below(8) ? below(c->layer.experts) : -1;
        if (c->ids[p] < 0)
            continue;
        naive_expert(&c->layer, c->ids[p], c->hidden + row, &seen[c->ids[p]], term);
        for (long i = 0; i < c->layer.hidden; i++)
            c->want[row + i] += c->weights[p] * term[i];
    }
    for (int e = 0; e < c->layer.experts; e++)
        free(seen[e].gate), free(seen[e].up), free(seen[e].down);
    free(term);
}

static void free_case(expert_case *c)
{
    for (int e = 0; e < c->layer.experts; e++)
        free(c->blobs[e]);
    free(c->hidden), free(c->weights), free(c->out), free(c->want), free(c->ids);
}

static tm_experts_call call_of(const expert_case *c, tm_pool *pool)
{
    tm_experts_room room = {c->layer.hidden, c->layer.width, c->layer.experts, c->rows, c->top};
    return (tm_experts_call){.work = tm_experts_work_new(pool, &room), .layer = &c->layer, .rows = c->rows,
                             .top = c->top, .hidden = c->hidden, .ids = c->ids, .weights = c->weights, .out = c->out};
}

static void check_case(const expert_case *c, const char *what)
{
    double error = distance(c->out, c->want, (long)c->rows * c->layer.hidden);
    /* The last bit of h may tip an int8 over: one such tie costs up to 4e-3 of a narrow layer's result. */
    CHECK(error < 5e-3, "%s: experts %s/%s, %d rows: error %g", what, tm_formats[c->layer.gate_format].name,
          tm_formats[c->layer.down_format].name, c->rows, error);
}

static void test_experts(tm_pool *pool, int rows)
{
    expert_case c;
    make_case(pool, &c, rows);
    tm_experts_call call = call_of(&c, pool);
    for (call.many = 0; call.many < 2; call.many++) {
        memset(c.out, 0xff, sizeof(float) * (size_t)rows * (size_t)c.layer.hidden); /* NaN */
        tm_experts_run(&call);
        CHECK(call.status == TM_OK, "experts status %d", call.status);
        check_case(&c, call.many ? "many" : "few");
    }
    tm_experts_work_free(call.work);
    free_case(&c);
}

static void test_refusals(tm_pool *pool)
{
    expert_case c;
    make_case(pool, &c, 2);
    tm_experts_call good = call_of(&c, pool), call = good;
    int64_t far[16] = {c.layer.experts};
    for (int i = 1; i < 16; i++)
        far[i] = 0;
    call.ids = far;
    CHECK(tm_experts_submit(&call) == TM_ERR_ROUTE, "far id");
    call = good, call.rows = 3;
    CHECK(tm_experts_submit(&call) == TM_ERR_ROOM, "too many rows");
    call = good, call.out_type = TM_TYPES;
    CHECK(tm_experts_submit(&call) == TM_ERR_TYPE, "type");
    tm_experts odd = c.layer;
    odd.down_format = TM_Q4_K, odd.width = 32;
    call = good, call.layer = &odd;
    CHECK(tm_experts_submit(&call) == TM_ERR_SHAPE, "shape");
    CHECK(!tm_experts_work_new(pool, &(tm_experts_room){1 << 25, 1, 1, 1, 1}), "huge room");
    CHECK(!tm_linear_work_new(pool, 0, 1), "empty room");
    tm_experts_work_free(good.work);
    free_case(&c);
}

/* ---- threads ---- */

typedef struct {
    tm_pool *pool;
    expert_case *c;
    int rounds;
} engine;

static void *run_engine(void *arg)
{
    engine *e = arg;
    expert_case mine = *e->c;
    mine.out = malloc(sizeof(float) * (size_t)(mine.rows * mine.layer.hidden));
    tm_experts_call call = call_of(&mine, e->pool);
    for (int i = 0; i < e->rounds; i++) {
        memset(mine.out, 0, sizeof(float) * (size_t)(mine.rows * mine.layer.hidden));
        tm_experts_run(&call);
        check_case(&mine, "engine");
        if (i % 16 == 0)
            usleep(1000); /* let helpers fall asleep */
    }
    tm_experts_work_free(call.work);
    free(mine.out);
    return NULL;
}

static void test_engines(tm_pool *a, tm_pool *b, int rounds)
{
    enum { ENGINES = 4 };
    expert_case c[ENGINES];
    pthread_t threads[ENGINES];
    engine engines[ENGINES];
    for (int i = 0; i < ENGINES; i++) {
        make_case(a, &c[i], 1 + i);
        engines[i] = (engine){i % 2 ? a : b, &c[i], rounds};
    }
    for (int i = 0; i < ENGINES; i++)
        pthread_create(&threads[i], NULL, run_engine, &engines[i]);
    for (int i = 0; i < ENGINES; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < ENGINES; i++)
        free_case(&c[i]);
}

static void test_overlap(tm_pool *pool)
{
    expert_case c[3];
    tm_experts_call calls[3];
    for (int i = 0; i < 3; i++) {
        make_case(pool, &c[i], 2);
        calls[i] = call_of(&c[i], pool);
        CHECK(tm_experts_submit(&calls[i]) == TM_OK, "overlapping submission");
    }
    for (int i = 2; i >= 0; i--) {
        tm_experts_wait(&calls[i]);
        check_case(&c[i], "overlap");
        tm_experts_work_free(calls[i].work);
    }
    for (int i = 0; i < 3; i++)
        free_case(&c[i]);
}

static void test_fork(tm_pool *pool)
{
    expert_case c;
    make_case(pool, &c, 2);
    engine e = {pool, &c, 20};
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        run_engine(&e);
        _exit(0);
    }
    run_engine(&e);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "child left with %d", status);
    free_case(&c);
}

/* ---- the bell ---- */

static void test_bell(tm_pool *pool, long hot_us)
{
    expert_case c;
    make_case(pool, &c, 1);
    tm_experts_call call = call_of(&c, pool);
    tm_errand errand = {tm_experts_run, &call, &call.status};
    tm_bell *bell = aligned_alloc(64, sizeof *bell);
    memset(bell, 0, sizeof *bell);
    tm_bell_server *server = tm_bell_start(bell, &errand, 1, hot_us);
    for (uint32_t ring = 1; ring <= 50; ring++) {
        bell->errand = ring % 10 == 0; /* every tenth is unknown */
        memset(c.out, 0, sizeof(float) * (size_t)c.layer.hidden);
        atomic_store_explicit(&bell->ring, ring, memory_order_release);
        while (atomic_load_explicit(&bell->answer, memory_order_acquire) != ring)
            ;
        CHECK(bell->status == (ring % 10 ? TM_OK : TM_ERR_ERRAND), "bell status %d", bell->status);
        if (ring % 10)
            check_case(&c, "bell");
    }
    tm_bell_stop(server);
    tm_experts_work_free(call.work);
    free(bell);
    free_case(&c);
}

static void test_read(tm_pool *pool)
{
    size_t bytes = 64 * 5000;
    uint64_t *memory = aligned_alloc(64, bytes), sum = 0;
    for (size_t i = 0; i < bytes / 8; i++)
        sum += memory[i] = any();
    CHECK(tm_read(pool, memory, bytes) == sum, "sum of what was read");
    free(memory);
}

/* ---- all of it ---- */

/* Levels round activations alike, bit by bit, whatever they are: NaN, infinities, subnormal and huge numbers too. Only
 * the order within a step of as many groups as a level has lanes is its own (kernels.h). */
static void test_rounding(void)
{
    enum { COLS = 1024 };
    static const char *const levels[] = {"portable", "avx2", "avx512"};
    float x[COLS];
    char *first = calloc(1, (size_t)tm_act_bytes(COLS)), *row = calloc(1, (size_t)tm_act_bytes(COLS));
    const tm_act want = tm_act_at(first, COLS), got = tm_act_at(row, COLS);
    for (int i = 0; i < COLS; i++) {
        uint32_t bits = any() << 16 ^ any(), kind = (uint32_t)(i / TM_GROUP) % 4;
        memcpy(&x[i], &bits, sizeof bits);
        x[i] = kind == 0 ? x[i] : kind == 1 ? real() : kind == 2 ? (float)below(255) / 2 : real() * 0x1p-101f;
    }
    for (int l = 0; l < 3; l++) {
        int lanes = 4 << l;
        if (tm_level_force(levels[l]))
            continue;
        tm_level_now()->quantise(x, l ? got : want, 0, COLS / TM_GROUP);
        for (int g = 0; l && g < COLS / TM_GROUP; g++) {
            int start = g / lanes * lanes, lane = g % (lanes / 4) * 4 + g % lanes / (lanes / 4);
            int same = !memcmp(&got.scale[start + lane], &want.scale[g], 4) && !memcmp(&got.sum[g], &want.sum[g], 4)
                       && !memcmp(&got.sum2[g], &want.sum2[g], 4);
            for (int j = 0; j < 8; j++)
                same &= !memcmp(got.values + start * TM_GROUP + 4 * lane + 4 * lanes * j,
                                want.values + g / 4 * 128 + g % 4 * 4 + 16 * j, 4);
            CHECK(same, "%s rounds group %d otherwise than portable", levels[l], g);
        }
    }
    free(first), free(row);
}

/* Levels and threads encode alike, bit by bit, and stay within memory of the exact size. */
static void test_trellis(tm_pool *pool)
{
    static const char *const levels[] = {"portable", "avx2", "avx512"};
    static const struct { int window, step, values; } shapes[] = {{9, 2, 1}, {10, 5, 2}, {10, 3, 1}, {10, 4, 1}};
    int kind = below(4), step = shapes[kind].step, values = shapes[kind].values;
    int states = 1 << shapes[kind].window, groups = states >> step, dim = 32 << below(5), count = below(40);
    int bytes = dim / values * step / 8;
    float *book = malloc(sizeof *book * (size_t)(values * states)), *turned = malloc(sizeof *book * (size_t)(values * states));
    for (int i = 0; i < values * states; i++) {
        int v = i / states, state = i % states;
        book[i] = 3 * real();
        turned[(v * (1 << step) + state % (1 << step)) * groups + (state >> step)] = book[i];
    }
    float *x = malloc(sizeof *x * (size_t)(count * dim));
    for (int i = 0, zero = 0; i < count * dim; i++) {
        zero = i % dim ? zero : !below(8);
        x[i] = zero ? 0.0f : real() * (below(200) ? 1.0f : INFINITY);
    }
    uint8_t *codes[2] = {malloc((size_t)(count * bytes)), malloc((size_t)(count * bytes))};
    uint16_t *scales[2] = {malloc(2 * (size_t)count), malloc(2 * (size_t)count)};
    for (int l = 0; l < 3; l++) {
        if (tm_level_force(levels[l]))
            continue;
        tm_trellis job = {kind, dim, x, book, turned, codes[l > 0], scales[l > 0]};
        CHECK(tm_trellis_encode(l == 1 ? pool : NULL, &job, count) == TM_OK, "trellis refused");
        int same = !l || !memcmp(codes[0], codes[1], (size_t)(count * bytes));
        for (int i = 0; l && i < count; i++) /* a NaN's sign is its own */
            same &= (scales[0][i] & 0x7fff) == (scales[1][i] & 0x7fff);
        CHECK(same, "%s encodes kind %d of %d otherwise than portable", levels[l], kind, dim);
    }
    free(book), free(turned), free(x), free(codes[0]), free(codes[1]), free(scales[0]), free(scales[1]);
}

/* A random shape at a random level: a linear layer, or routed experts. */
static void test_any(tm_pool *pool)
{
    static const char *const levels[] = {"avx512", "avx2", "portable"};
    while (tm_level_force(levels[below(3)]))
        ;
    if (below(3))
        test_linear(pool, below(TM_FORMATS), 1 + below(below(16) ? 8 : 60), below(2));
    else
        test_experts(pool, 1 + below(below(16) ? 3 : 40));
}

int main(int argc, char **argv)
{
    int cases = argc > 1 ? atoi(argv[1]) : 500, rounds = argc > 2 ? atoi(argv[2]) : 3, done = 0;
    tm_pool *pool = tm_pool_new(3, 100), *other = tm_pool_new(2, 0);
    for (int i = 0; i < 200; i++)
        test_rounding();
    for (int i = 0; i < cases / 25; i++)
        test_trellis(pool);
    for (; done < cases; done++)
        test_any(pool);
    printf("%d random shapes and routings agree with the reference\n", done);
    tm_level_force("auto");
    test_refusals(pool);
    test_read(pool);
    for (int i = 0; i < rounds; i++) {
        test_overlap(pool);
        test_overlap(other);
        test_engines(pool, other, 60);
        test_bell(pool, i % 2 ? 0 : 5000);
    }
    test_fork(pool);
    tm_pool_free(pool);
    tm_pool_free(other);
    printf("threads, fork and bell are sound\n");
    return 0;
}
