/* Before and behind the global transformer on a CPU, fp32: closed patches are pooled to vectors, and the keys and
 * values that decoder rows read of its latents are stored. upstream.py has the mathematics and the shapes.
 *
 * Threads share the patches. Every patch is computed alone, so no result depends on the patches beside it.
 */
#include "upstream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dense.h"
#include "export.h"
#include "team.h"

/* Byte states that a thread must have to pool, or latents to store, to be worth its waking. */
#define LEAST 24

/* One query over the keys and values [count, kv_heads * dim] of its patch. `weights` has room for `count`. */
static void attend_patch(const float *query, const float *keys, const float *values, int64_t count,
                         const struct pooling *m, float *weights, float *out) {
    int64_t stride = m->kv_heads * m->dim, groups = m->heads / m->kv_heads, dim = m->dim;
    float scale = 1.0f / sqrtf((float)dim);
    for (int64_t h = 0; h < m->heads; h++, query += dim, out += dim) {
        int64_t at = h / groups * dim;
        float best = -INFINITY, total = 0.0f;
        for (int64_t j = 0; j < count; j++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < dim; d++) sum += query[d] * keys[j * stride + at + d];
            weights[j] = sum * scale;
            best = weights[j] > best ? weights[j] : best;
        }
        for (int64_t j = 0; j < count; j++) total += weights[j] = expf(weights[j] - best);
        for (int64_t d = 0; d < dim; d++) out[d] = 0.0f;
        for (int64_t j = 0; j < count; j++) {
            float weight = weights[j] / total;
#pragma omp simd
            for (int64_t d = 0; d < dim; d++) out[d] += weight * values[j * stride + at + d];
        }
    }
}

/* Patches [first, first + n) of `bytes` bytes together. Returns 0, or 1 when memory ran out. */
static int pool(const struct pooling *m, const struct patches *p, int64_t first, int64_t n, int64_t bytes, float *out) {
    int64_t size = m->size, wide = m->heads * m->dim, narrow = m->kv_heads * m->dim, asked = n * m->k;
    float *states = malloc(sizeof(float) * (bytes * (size + 2 * narrow + 1) + n * size + asked * (size + 2 * wide)));
    if (!states) return 1;
    float *keys = states + bytes * size, *values = keys + bytes * narrow, *weights = values + bytes * narrow;
    float *peaks = weights + bytes, *residual = peaks + n * size, *queries = residual + asked * size;
    float *attended = queries + asked * wide, *next = states;
    for (int64_t i = first; i < first + n; i++, peaks += size) {
        for (int64_t at = p->starts[i]; at <= p->ends[i]; at++, next += size) {
            memcpy(next, p->states + slot_of(&p->pages, p->owners[i], at) * size, sizeof(float) * size);
            /* NaN must reach the vector, where it ends its own request. */
            for (int64_t d = 0; d < size; d++)
                if (at == p->starts[i] || next[d] > peaks[d] || next[d] != next[d]) peaks[d] = next[d];
        }
    }
    peaks -= n * size;
    struct linear of_bytes[] = {{m->keys, narrow, keys}, {m->values, narrow, values}};
    struct linear of_peaks[] = {{m->projection, m->k * size, residual}}, of_queries[] = {{m->queries, wide, queries}};
    int failed = fastblt_project(states, bytes, size, m->key_gain, m->key_eps, of_bytes, 2);
    failed |= fastblt_project(peaks, n, size, NULL, 0, of_peaks, 1);
    failed |= fastblt_project(residual, asked, size, m->query_gain, m->query_eps, of_queries, 1);
    int64_t done = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t count = p->ends[first + i] - p->starts[first + i] + 1;
        for (int64_t q = i * m->k; q < (i + 1) * m->k; q++)
            attend_patch(queries + q * wide, keys + done * narrow, values + done * narrow, count, m, weights,
                         attended + q * wide);
        done += count;
    }
    fastblt_project_add(attended, asked, wide, m->out, size, residual, 2, out + first * m->k * size);
    free(states);
    return failed;
}

static int64_t bytes_of(const struct patches *p, int64_t first, int64_t last) {
    int64_t bytes = 0;
    for (int64_t i = first; i < last; i++) bytes += p->ends[i] - p->starts[i] + 1;
    return bytes;
}

/* The patches of a call in `parts` shares. */
struct pools {
    const struct pooling *m;
    const struct patches *p;
    int64_t n, parts;
    float *out;
    _Atomic int failed;
};

static void pool_share(void *with, int64_t item, int64_t room) {
    struct pools *all = with;
    int64_t first = all->n * item / all->parts, last = all->n * (item + 1) / all->parts;
    (void)room;
    if (first < last && pool(all->m, all->p, first, last - first, bytes_of(all->p, first, last), all->out))
        all->failed = 1;
}

/* Vectors out [n, k * size] of n patches. Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_pool(const struct pooling *m, const struct patches *p, int64_t n, int64_t threads, float *out) {
    int64_t bytes = bytes_of(p, 0, n), parts = bytes / LEAST < threads ? bytes / LEAST : threads;
    if (parts < 2) return pool(m, p, 0, n, bytes, out);
    struct pools all = {.m = m, .p = p, .n = n, .parts = parts, .out = out};
    share_out(pool_share, &all, parts, parts);
    return all.failed;
}

/* Latents [first, first + n) of [.., width]. Returns 0, or 1 when memory ran out. */
static int store_latents(const struct reading *to, const float *latents, int64_t width, int64_t first, int64_t n) {
    int64_t rows = n * to->k, one = to->k * to->narrow, size = to->size;
    float *source = malloc(sizeof(float) * rows * (size + 2 * to->narrow));
    if (!source) return 1;
    float *keys = source + rows * size, *values = keys + rows * to->narrow;
    struct linear of_latents[] = {{to->projection, to->k * size, source}};
    int failed = fastblt_project(latents + first * width, n, width, NULL, 0, of_latents, 1);
    for (int64_t layer = 0; layer < to->count; layer++) {
        const struct reader *r = to->readers + layer;
        struct linear of_source[] = {{r->keys, to->narrow, keys}, {r->values, to->narrow, values}};
        failed |= fastblt_project(source, rows, size, r->gain, r->eps, of_source, 2);
        for (int64_t i = 0; i < n; i++) {
            float *slot = to->store + (to->slots[first + i] * to->count + layer) * 2 * one;
            memcpy(slot, keys + i * one, sizeof(float) * one);
            memcpy(slot + one, values + i * one, sizeof(float) * one);
        }
    }
    free(source);
    return failed;
}

/* The latents of a call in `parts` shares. */
struct storing {
    const struct reading *to;
    const float *latents;
    int64_t n, width, parts;
    _Atomic int failed;
};

static void store_share(void *with, int64_t item, int64_t room) {
    struct storing *all = with;
    int64_t first = all->n * item / all->parts, last = all->n * (item + 1) / all->parts;
    (void)room;
    if (store_latents(all->to, all->latents, all->width, first, last - first)) all->failed = 1;
}

/* Keys and values of n latents [n, width] to their slots. Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_store_latents(const struct reading *to, const float *latents, int64_t n, int64_t width,
                                 int64_t threads) {
    int64_t parts = n / LEAST < threads ? n / LEAST : threads;
    if (parts < 2) return store_latents(to, latents, width, 0, n);
    struct storing all = {.to = to, .latents = latents, .n = n, .width = width, .parts = parts};
    share_out(store_share, &all, parts, parts);
    return all.failed;
}
