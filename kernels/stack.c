/* All of a module over the rows of a pass, on a CPU, fp32: what the rows begin as, the layers, and what becomes of them.
 * What a layer computes stands in models/layers.py; its parts are the functions of the included files.
 *
 * Threads share the rows. Rows of different requests have nothing to do with each other, so where requests can be shared
 * out evenly each thread takes its own through all layers. Where one has most of the rows, a prompt, these are shared out
 * too, and in each layer the threads wait for each other's keys and values. Every row is computed as if it were alone, so
 * none of this changes a result.
 */
#include <omp.h>

#include "dense.c"
#include "hash_embedding.c"
#include "latent_attention.c"
#include "paged_attention.c"
#include "paged_rows.h"

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

/* The latents that cross-attentions read: a slot of so many floats for each row, and in it so many for each layer. */
struct latents {
    const float *store;
    const int32_t *slots;
    int64_t slot_size, layer_size, keys;
};

/* What rows begin as: where `block` has an id, that row of `block_table`; else, of the request's ids (`pad` of them before
 * its first), the hashed windows or the rows of a table; or kept states. */
struct source {
    const int32_t *block;
    const float *block_table;
    const int64_t *ids;
    int64_t stride, pad;
    const struct tables *hashed;
    const float *table, *states;
    struct pages pages;
};

/* What becomes of them: a norm; entropies of what the head makes of them; states to keep. Each where it is not NULL. Of
 * rows that are not `read`, where that is given, nothing is wanted but the keys and values that later rows attend to. */
struct sink {
    const uint8_t *read;
    const float *gain, *head;
    float *entropies, *states;
    struct pages pages;
    int64_t vocabulary;
    float eps;
};

static void begin(const struct source *from, const struct places *at, int64_t first, int64_t n, int64_t size, float *x) {
    for (int64_t i = first; i < first + n; i++) {
        const int64_t *ids = from->ids + at->rows[i] * from->stride + at->positions[i];
        float *row = x + i * size;
        if (from->block && from->block[i] >= 0) {
            memcpy(row, from->block_table + from->block[i] * size, sizeof(float) * size);
        } else if (from->hashed) {
            embed(ids, from->hashed, row);
        } else if (from->table) {
            memcpy(row, from->table + ids[from->pad] * size, sizeof(float) * size);
        } else {
            int64_t slot = slot_of(&from->pages, at->rows[i], at->positions[i]);
            memcpy(row, from->states + slot * size, sizeof(float) * size);
        }
    }
}

/* Nats of softmax(z). NaN stays. */
static float entropy_of(const float *z, int64_t count) {
    float peak = z[0], total = 0.0f, mean = 0.0f;
    for (int64_t i = 1; i < count; i++) peak = z[i] > peak || z[i] != z[i] ? z[i] : peak;
#pragma omp simd reduction(+ : total, mean)
    for (int64_t i = 0; i < count; i++) {
        /* No infinity, which times nothing would be no number. */
        float below = z[i] - peak < -87.0f ? -87.0f : z[i] - peak, e = exp_below(below);
        total += e, mean += e * below;
    }
    return logf(total) - mean / total;
}

/* Returns 0, or 1 when memory ran out. */
static int end(const struct sink *to, const struct places *at, int64_t first, int64_t n, int64_t size, float *x) {
    float *rows = x + first * size;
    if (to->gain) norm(rows, n, size, to->gain, to->eps, rows);
    if (to->states)
        for (int64_t i = first; i < first + n; i++) {
            int64_t slot = slot_of(&to->pages, at->rows[i], at->positions[i]);
            memcpy(to->states + slot * size, x + i * size, sizeof(float) * size);
        }
    if (!to->head) return 0;
    float *logits = malloc(sizeof(float) * BLOCK * to->vocabulary);
    if (!logits) return 1;
    for (int64_t done = 0; done < n; done += BLOCK) {
        int64_t count = n - done < BLOCK ? n - done : BLOCK;
        map(rows + done * size, count, size, to->head, (struct target){logits, NULL, to->vocabulary, 0});
        for (int64_t i = 0; i < count; i++)
            to->entropies[first + done + i] = entropy_of(logits + i * to->vocabulary, to->vocabulary);
    }
    free(logits);
    return 0;
}

static int64_t work_of(const struct places *at, int64_t row) { return ROW + at->highs[row] - low_of(at, row); }

/* Cuts the rows into shares [starts[p], starts[p + 1]) of about the same work, between requests unless `anywhere`; a row
 * of the null request belongs to nobody. Returns the work of the largest share. */
static int64_t cut(const struct places *at, int64_t n, int64_t total, int64_t parts, int anywhere, int64_t *starts) {
    int64_t done = 0, own = 0, largest = 0, p = 1;
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        int between = anywhere || !i || at->rows[i] != at->rows[i - 1] || !at->rows[i];
        if (own && between && p < parts && done * parts >= total * p) {
            largest = own > largest ? own : largest;
            starts[p++] = i, own = 0;
        }
        own += work_of(at, i), done += work_of(at, i);
    }
    while (p <= parts) starts[p++] = n;
    return own > largest ? own : largest;
}

/* What a layer makes of rows [first, first + n) when all keys and values are written, in place. */
static int finish(const struct module *m, const struct layer *w, const float *cache, const struct places *at,
                  int64_t first, int64_t n, const float *q, float *attended, float *x) {
    int failed = attend_rows(q, cache, at, layout_of(at, m->heads, m->kv_heads, m->dim), first, n, attended);
    fastblt_project_add(attended, n, m->heads * m->dim, w->out, m->size, x, 1, x);
    return failed |
           fastblt_feed_forward(x, n, m->size, w->inner_gain, w->inner_eps, w->gate, w->up, m->inner, w->down, x);
}

/* Rows [first, first + n) of x [.., size] through all layers, in place; `together`: beside other threads whose rows these
 * may read. `scratch` has room for queries, attended, keys and values of the rows. Returns 0, or 1 when memory ran out. */
static int run(const struct module *m, float *const *caches, const struct places *at, const struct latents *latents,
               const struct source *from, const struct sink *to, int64_t first, int64_t n, int together, float *scratch,
               float *whole) {
    int64_t wide = m->heads * m->dim, narrow = m->kv_heads * m->dim;
    float *q = scratch, *attended = q + n * wide, *k = attended + n * wide, *v = k + n * narrow;
    struct layout heads = layout_of(at, m->heads, m->kv_heads, m->dim);
    const uint8_t *read = to && to->read ? to->read + first : NULL;
    int failed = 0;
    float *x = whole + first * m->size;
    if (from) begin(from, at, first, n, m->size, whole);
    /* A thread that failed goes on, for the others wait for it. */
    for (int64_t i = 0; i < m->count; i++) {
        const struct layer *w = m->layers + i;
        if (w->cross_queries) {
            failed |= fastblt_project(x, n, m->size, w->cross_gain, w->cross_eps, w->cross_queries, wide, q, NULL, 0, NULL,
                                      NULL, 0, NULL);
            failed |= fastblt_latent_attention(q, latents->store + i * latents->layer_size, latents->slots + first,
                                               latents->slot_size, n, m->heads, m->kv_heads, m->dim, latents->keys, 1,
                                               attended);
            fastblt_project_add(attended, n, wide, w->cross_out, m->size, x, 2, x);
        }
        failed |= fastblt_project(x, n, m->size, w->gain, w->eps, w->queries, wide, q, w->keys, narrow, k, w->values,
                                  narrow, v);
        write_rows(k, v, at, heads, first, n, caches[i]);
        if (together) {
#pragma omp barrier
        }
        if (!read || i < m->count - 1) {
            failed |= finish(m, w, caches[i], at, first, n, q, attended, x);
            continue;
        }
        for (int64_t from = 0, stop; from < n; from = stop) {
            for (stop = from + 1; stop < n && read[stop] == read[from];) stop++;
            if (read[from])
                failed |= finish(m, w, caches[i], at, first + from, stop - from, q + from * wide, attended,
                                 x + from * m->size);
        }
    }
    return to ? failed | end(to, at, first, n, m->size, whole) : failed;
}

/* Rows x [n, size] through the module, in place, with a cache for each layer. Where there is a source, what x holds before
 * does not matter. Returns 0, or 1 when memory ran out. */
int fastblt_stack(const struct module *module, float *const *caches, const struct places *at,
                  const struct latents *latents, const struct source *from, const struct sink *to, int64_t n,
                  int64_t threads, float *x) {
    int64_t each = 2 * (module->heads + module->kv_heads) * module->dim, total = 0;
    float *scratch = malloc(sizeof(float) * (n * each + 1));
    if (!scratch) return 1;
    for (int64_t i = 0; i < n; i++) total += work_of(at, i);
    int64_t parts = total / LEAST < threads ? total / LEAST : threads;
    if (parts > MOST_THREADS) parts = MOST_THREADS;
    int failed = 0;
    if (parts < 2) {
        failed = run(module, caches, at, latents, from, to, 0, n, 0, scratch, x);
    } else {
#pragma omp parallel num_threads(parts) reduction(| : failed)
        {
            int64_t starts[MOST_THREADS + 1], team = omp_get_num_threads(), me = omp_get_thread_num();
            int together = cut(at, n, total, team, 0, starts) * team > total + total / 4;
            if (together) cut(at, n, total, team, 1, starts);
            int64_t first = starts[me], count = starts[me + 1] - first;
            failed |= run(module, caches, at, latents, from, to, first, count, together, scratch + first * each, x);
        }
    }
    free(scratch);
    return failed;
}
