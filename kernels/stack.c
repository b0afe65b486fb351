/* All layers of a module over the rows of a pass, on a CPU, fp32. What a layer computes stands in models/layers.py; its
 * parts are the functions of the included files.
 *
 * Rows of different requests have nothing to do with each other, so threads share the requests, and each takes its own
 * through all layers. Every row is computed as if it were alone, so this changes no result.
 */
#include "dense.c"
#include "latent_attention.c"
#include "paged_attention.c"

#define MOST_THREADS 64
/* What the dense part of a row costs, in keys that it could attend to in that time; and what a thread must have to do,
 * in the same unit, to be worth its waking. */
#define ROW 160
#define LEAST 2000

/* Weights as dense.py packs them. The first three are of a cross-attention before the layer, or NULL. */
struct layer {
    const float *cross_gain, *cross_queries, *cross_out;
    const float *gain, *queries, *keys, *values, *out;
    const float *inner_gain, *gate, *up, *down;
    float cross_eps, eps, inner_eps;
};

struct module {
    const struct layer *layers;
    int64_t count, size, inner, heads, kv_heads, dim;
};

/* Where the rows stand, as paged_attention.py says, and a cache for each layer. */
struct places {
    const float *turns;
    float *const *caches;
    const int32_t *table, *rows, *positions, *lows, *highs;
    int64_t table_stride, page;
};

/* The latents that cross-attentions read: a slot of so many floats for each row, and in it so many for each layer. */
struct latents {
    const float *store;
    const int64_t *slots;
    int64_t slot_size, layer_size, keys;
};

/* Rows [first, first + n) of x [.., size] through all layers, in place. Returns 0, or 1 when memory ran out. */
static int run(const struct module *m, const struct places *at, const struct latents *latents, int64_t first, int64_t n,
               int64_t threads, float *x) {
    int64_t wide = m->heads * m->dim, narrow = m->kv_heads * m->dim;
    float *q = malloc(sizeof(float) * n * 2 * (wide + narrow)), *attended = q + n * wide, *k = attended + n * wide;
    if (!q) return 1;
    float *v = k + n * narrow;
    int failed = 0;
    x += first * m->size;
    for (int64_t i = 0; i < m->count && !failed; i++) {
        const struct layer *w = m->layers + i;
        if (w->cross_queries) {
            failed |= fastblt_project(x, n, m->size, w->cross_gain, w->cross_eps, w->cross_queries, wide, q, NULL, 0, NULL,
                                      NULL, 0, NULL);
            failed |= fastblt_latent_attention(q, latents->store + i * latents->layer_size, latents->slots + first,
                                               latents->slot_size, n, m->heads, m->kv_heads, m->dim, latents->keys,
                                               threads, attended);
            fastblt_project_add(attended, n, wide, w->cross_out, m->size, x, 2, x);
        }
        failed |= fastblt_project(x, n, m->size, w->gain, w->eps, w->queries, wide, q, w->keys, narrow, k, w->values,
                                  narrow, v);
        failed |= fastblt_paged_attention(q, k, v, at->turns, at->caches[i], at->table, at->table_stride,
                                          at->rows + first, at->positions + first, at->lows + first, at->highs + first,
                                          n, m->heads, m->kv_heads, m->dim, at->page, threads, attended);
        fastblt_project_add(attended, n, wide, w->out, m->size, x, 1, x);
        failed |= fastblt_feed_forward(x, n, m->size, w->inner_gain, w->inner_eps, w->gate, w->up, m->inner, w->down, x);
    }
    free(q);
    return failed;
}

/* Cuts the rows between requests into at most `threads` shares of about the same work; `starts` has one more. A row of
 * the null request belongs to nobody. */
static int64_t share(const struct places *at, int64_t n, int64_t threads, int64_t *starts) {
    int64_t total = 0, done = 0, parts = 1;
    for (int64_t i = 0; i < n; i++) total += ROW + at->highs[i] - at->lows[i];
    int64_t wanted = total / LEAST < threads ? total / LEAST : threads;
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        int between = i && (at->rows[i] != at->rows[i - 1] || !at->rows[i]);
        if (between && parts < wanted && done * wanted >= total * parts) starts[parts++] = i;
        done += ROW + at->highs[i] - at->lows[i];
    }
    starts[parts] = n;
    return parts;
}

/* Rows x [n, size] through the module, in place. Returns 0, or 1 when memory ran out. */
int fastblt_stack(const struct module *module, const struct places *at, const struct latents *latents, int64_t n,
                  int64_t threads, float *x) {
    if (!n) return 0;
    int64_t starts[MOST_THREADS + 1], parts = share(at, n, threads, starts);
    if (parts == 1) return run(module, at, latents, 0, n, threads, x);
    int failed = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : failed)
    for (int64_t p = 0; p < parts; p++)
        failed |= run(module, at, latents, starts[p], starts[p + 1] - starts[p], 1, x);
    return failed;
}
