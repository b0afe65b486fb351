/* Paged attention of ragged rows on a CPU, fp32. The mathematics and the shapes stand in paged_attention.py.
 *
 * Every row is computed alone, over its keys in order, tile by tile, so its result cannot depend on the rest of the
 * batch, on how a prompt was cut into chunks, or on where its pages lie. One row's keys and values are read once and in
 * the order they lie in.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE 64

static void turn(const float *x, const float *turns, float *out, int64_t dim, float scale) {
    for (int64_t i = 0; i < dim / 2; i++) {
        float c = turns[2 * i], s = turns[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = (a * c - b * s) * scale;
        out[2 * i + 1] = (a * s + b * c) * scale;
    }
}

/* e^x for x <= 0 to 2 units in the last place, in a form that compilers turn into vectors. */
static inline float exp_below(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

struct layout {
    int64_t heads, kv_heads, dim, page;
};

/* One row over its keys [lo, hi). `q` is rotated and scaled; `scores` has TILE, `best` and `total` one float a head.
 * `dim` and `groups` repeat the layout's, as constants where the caller knows them. */
static inline __attribute__((always_inline)) void attend(const float *restrict q, const float *cache,
                                                         const int32_t *pages, int64_t lo, int64_t hi,
                                                         struct layout at, int64_t dim, int64_t groups,
                                                         float *restrict scores, float *restrict best,
                                                         float *restrict total, float *restrict out) {
    int64_t stride = 2 * at.kv_heads * dim;
    for (int64_t h = 0; h < at.heads; h++) best[h] = -INFINITY, total[h] = 0.0f;
    memset(out, 0, sizeof(float) * at.heads * dim);
    for (int64_t base = lo; base < hi;) {
        /* Tiles end at multiples of TILE, whatever the page size: where a sum is cut depends on positions alone. */
        int64_t end = (base / TILE + 1) * TILE;
        if (end > hi) end = hi;
        int64_t count = end - base;
        const float *slots[TILE];
        for (int64_t p = base; p < end;) {
            const float *slot = cache + ((int64_t)pages[p / at.page] * at.page + p % at.page) * stride;
            int64_t stop = (p / at.page + 1) * at.page;
            for (stop = stop < end ? stop : end; p < stop; p++, slot += stride) slots[p - base] = slot;
        }
        for (int64_t j = 0; j < count; j++)
            for (int64_t g = 0; g < at.kv_heads; g++) {
                const float *key = slots[j] + g * dim;
                for (int64_t i = 0; i < groups; i++) {
                    const float *query = q + (g * groups + i) * dim;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t d = 0; d < dim; d++) sum += query[d] * key[d];
                    scores[(g * groups + i) * TILE + j] = sum;
                }
            }
        for (int64_t h = 0; h < at.heads; h++) {
            float *score = scores + h * TILE, peak = best[h], sum = 0.0f;
#pragma omp simd reduction(max : peak)
            for (int64_t j = 0; j < count; j++) peak = score[j] > peak ? score[j] : peak;
            float shrink = exp_below(best[h] - peak);
            /* A score of NaN must reach the output, where it ends its own request. */
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; j++) {
                float s = score[j], e = exp_below(s - peak);
                score[j] = s == s ? e : s;
                sum += score[j];
            }
            total[h] = total[h] * shrink + sum;
            best[h] = peak;
            if (shrink != 1.0f)
                for (int64_t d = 0; d < dim; d++) out[h * dim + d] *= shrink;
        }
        for (int64_t j = 0; j < count; j++)
            for (int64_t g = 0; g < at.kv_heads; g++) {
                const float *value = slots[j] + (at.kv_heads + g) * dim;
                for (int64_t i = 0; i < groups; i++) {
                    float weight = scores[(g * groups + i) * TILE + j];
                    float *o = out + (g * groups + i) * dim;
#pragma omp simd
                    for (int64_t d = 0; d < dim; d++) o[d] += weight * value[d];
                }
            }
        base = end;
    }
    for (int64_t h = 0; h < at.heads; h++) {
        float inverse = 1.0f / total[h];
        for (int64_t d = 0; d < dim; d++) out[h * dim + d] *= inverse;
    }
}

static void attend_row(const float *q, const float *cache, const int32_t *pages, int64_t lo, int64_t hi,
                       struct layout at, float *scores, float *best, float *total, float *out) {
    int64_t groups = at.heads / at.kv_heads;
#define CASE(D, G) \
    if (at.dim == D && groups == G) { attend(q, cache, pages, lo, hi, at, D, G, scores, best, total, out); return; }
    CASE(32, 1) CASE(32, 4) CASE(64, 1) CASE(64, 3) CASE(128, 1) CASE(128, 3)
    attend(q, cache, pages, lo, hi, at, at.dim, groups, scores, best, total, out);
}

/* All keys and values are written before any row attends. Returns 0, or 1 when memory ran out. */
int fastblt_paged_attention(const float *q, const float *k, const float *v, const float *turns, float *cache,
                            const int32_t *table, int64_t table_stride, const int32_t *rows, const int32_t *positions,
                            const int32_t *lows, const int32_t *highs, int64_t n, int64_t heads, int64_t kv_heads,
                            int64_t dim, int64_t page, int64_t threads, float *out) {
    struct layout at = {heads, kv_heads, dim, page};
    int64_t stride = 2 * kv_heads * dim, work = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t *pages = table + rows[i] * table_stride;
        int64_t p = positions[i];
        float *slot = cache + ((int64_t)pages[p / page] * page + p % page) * stride;
        for (int64_t h = 0; h < kv_heads; h++) turn(k + (i * kv_heads + h) * dim, turns + p * dim, slot + h * dim, dim, 1);
        memcpy(slot + kv_heads * dim, v + i * kv_heads * dim, sizeof(float) * kv_heads * dim);
        work += highs[i] - lows[i];
    }
    int failed = 0;
    /* Waking a second thread costs more than a small pass. */
    int many = threads > 1 && n > 1 && work * heads * dim > 200000;
#pragma omp parallel num_threads(threads) if (many)
    {
        float *turned = malloc(sizeof(float) * heads * (size_t)(dim + TILE + 2));
        if (!turned) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) {
            if (!turned) continue;
            float scale = 1.0f / sqrtf((float)dim), *scores = turned + heads * dim, *best = scores + heads * TILE;
            for (int64_t h = 0; h < heads; h++)
                turn(q + (i * heads + h) * dim, turns + (int64_t)positions[i] * dim, turned + h * dim, dim, scale);
            attend_row(turned, cache, table + rows[i] * table_stride, lows[i], highs[i], at, scores, best,
                       best + heads, out + i * heads * dim);
        }
        free(turned);
    }
    return failed;
}
