/* Paged attention of ragged rows on a CPU, fp32. The mathematics and the shapes stand in paged_attention.py.
 *
 * Every (row, key head) is computed alone, over its keys in order, so a row's result cannot depend on the rest of the
 * batch, on how a prompt was cut into chunks, or on where its pages lie.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

static void turn(const float *x, const float *turns, float *out, int64_t dim, float scale) {
    for (int64_t i = 0; i < dim / 2; i++) {
        float c = turns[2 * i], s = turns[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = (a * c - b * s) * scale;
        out[2 * i + 1] = (a * s + b * c) * scale;
    }
}

static inline float dot(const float *a, const float *b, int64_t dim) {
    float sum = 0.0f;
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

static void attend(const float *q, const float *turns, const float *cache, const int32_t *pages, int64_t lo, int64_t hi,
                   int64_t head, int64_t groups, int64_t kv_heads, int64_t dim, int64_t page, float *scratch,
                   float *out) {
    int64_t count = hi - lo, stride = 2 * kv_heads * dim;
    float *turned = scratch, *scores = scratch + groups * dim;
    float scale = 1.0f / sqrtf((float)dim);
    for (int64_t g = 0; g < groups; g++) turn(q + g * dim, turns, turned + g * dim, dim, scale);
    for (int64_t at = lo; at < hi;) {
        int64_t end = (at / page + 1) * page;
        if (end > hi) end = hi;
        const float *key = cache + ((int64_t)pages[at / page] * page + at % page) * stride + head * dim;
        for (; at < end; at++, key += stride)
            for (int64_t g = 0; g < groups; g++) scores[g * count + at - lo] = dot(turned + g * dim, key, dim);
    }
    for (int64_t g = 0; g < groups; g++) {
        float *score = scores + g * count, best = -INFINITY, total = 0.0f;
        for (int64_t i = 0; i < count; i++) best = score[i] > best ? score[i] : best;
        for (int64_t i = 0; i < count; i++) score[i] = expf(score[i] - best);
        for (int64_t i = 0; i < count; i++) total += score[i];
        float inverse = 1.0f / total;
        for (int64_t i = 0; i < count; i++) score[i] *= inverse;
        for (int64_t i = 0; i < dim; i++) out[g * dim + i] = 0.0f;
    }
    for (int64_t at = lo; at < hi;) {
        int64_t end = (at / page + 1) * page;
        if (end > hi) end = hi;
        const float *value = cache + ((int64_t)pages[at / page] * page + at % page) * stride + (kv_heads + head) * dim;
        for (; at < end; at++, value += stride)
            for (int64_t g = 0; g < groups; g++) {
                float weight = scores[g * count + at - lo];
                float *o = out + g * dim;
                for (int64_t i = 0; i < dim; i++) o[i] += weight * value[i];
            }
    }
}

/* All keys and values are written before any row attends. Returns 0, or 1 when memory ran out. */
int fastblt_paged_attention(const float *q, const float *k, const float *v, const float *turns, float *cache,
                            const int32_t *table, int64_t table_stride, const int32_t *rows, const int32_t *positions,
                            const int32_t *lows, const int32_t *highs, int64_t n, int64_t heads, int64_t kv_heads,
                            int64_t dim, int64_t page, int threads, float *out) {
    int64_t groups = heads / kv_heads, stride = 2 * kv_heads * dim, work = 0, longest = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t *pages = table + rows[i] * table_stride;
        int64_t at = positions[i], span = highs[i] - lows[i];
        float *slot = cache + ((int64_t)pages[at / page] * page + at % page) * stride;
        for (int64_t h = 0; h < kv_heads; h++) turn(k + (i * kv_heads + h) * dim, turns + at * dim, slot + h * dim, dim, 1);
        for (int64_t j = 0; j < kv_heads * dim; j++) slot[kv_heads * dim + j] = v[i * kv_heads * dim + j];
        work += span;
        if (span > longest) longest = span;
    }
    int failed = 0;
    /* Waking a second thread costs more than a small pass. */
    int many = threads > 1 && work * heads * dim > 200000;
#pragma omp parallel num_threads(threads) if (many)
    {
        float *scratch = malloc(sizeof(float) * groups * (size_t)(longest + dim));
        if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < n * kv_heads; task++) {
            int64_t i = task / kv_heads, head = task % kv_heads;
            if (scratch)
                attend(q + (i * heads + head * groups) * dim, turns + (int64_t)positions[i] * dim, cache,
                       table + rows[i] * table_stride, lows[i], highs[i], head, groups, kv_heads, dim, page, scratch,
                       out + (i * heads + head * groups) * dim);
        }
        free(scratch);
    }
    return failed;
}
