/* The decoder's cross-attention on a CPU, fp32: every row reads the few keys of its latent where they lie, and is
 * computed alone. */
#include "latent_attention.h"

#include <math.h>

#include "export.h"

/* As in latent_attention.py. */
#define MOST_KEYS 64

EXPORT int fastblt_latent_attention(const float *q, const float *store, const int32_t *slots, int64_t slot_size,
                                    int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t keys,
                                    int64_t threads, float *out) {
    if (keys > MOST_KEYS) return 1;
    int64_t groups = heads / kv_heads, stride = kv_heads * dim;
    float scale = 1.0f / sqrtf((float)dim);
    int many = threads > 1 && n * heads * keys * dim > 200000;
#pragma omp parallel for num_threads(threads) if (many)
    for (int64_t row = 0; row < n; row++) {
        const float *key = store + slots[row] * slot_size, *value = key + keys * stride;
        for (int64_t h = 0; h < heads; h++) {
            const float *query = q + (row * heads + h) * dim;
            float *o = out + (row * heads + h) * dim;
            int64_t at = h / groups * dim;
            float weights[MOST_KEYS], best = -INFINITY, total = 0.0f;
            for (int64_t k = 0; k < keys; k++) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < dim; d++) sum += query[d] * key[k * stride + at + d];
                weights[k] = sum * scale;
                best = weights[k] > best ? weights[k] : best;
            }
            for (int64_t k = 0; k < keys; k++) total += weights[k] = expf(weights[k] - best);
            for (int64_t d = 0; d < dim; d++) o[d] = 0.0f;
            for (int64_t k = 0; k < keys; k++) {
                float weight = weights[k] / total;
#pragma omp simd
                for (int64_t d = 0; d < dim; d++) o[d] += weight * value[k * stride + at + d];
            }
        }
    }
    return 0;
}
