/* Byte embeddings plus hashed n-gram embeddings on a CPU, fp32. */
#include "hash_embedding.h"

#include "export.h"
#include "narrow.h"

/* Adds numbers of a table from `at` on. */
static void add(const void *table, int64_t type, int64_t at, int64_t size, float *restrict out) {
    if (type == FLOAT32)
        for (int64_t i = 0; i < size; i++) out[i] += ((const float *)table)[at + i];
    else
        for (int64_t i = 0; i < size; i++) out[i] += widen_one(((const uint16_t *)table)[at + i], type);
}

void embed(const int64_t *window, const struct tables *of, float *restrict out) {
    for (int64_t i = 0; i < of->size; i++) out[i] = 0.0f;
    for (int64_t t = 0; t < of->count; t++) {
        /* Wrapping products are unsigned ones; what they wrap to is signed, and its remainder is not negative. */
        uint64_t sum = 0;
        for (int64_t j = 0; j < of->width; j++) sum += (uint64_t)window[j] * (uint64_t)of->powers[t * of->width + j];
        int64_t hash = (int64_t)sum % of->vocab;
        if (hash < 0) hash += of->vocab;
        add(of->hashed, of->type, (t * of->vocab + hash) * of->size, of->size, out);
    }
    const float *own = of->bytes + window[of->width - 1] * of->size;
    for (int64_t i = 0; i < of->size; i++) out[i] += own[i];
}

EXPORT void fastblt_hash_embedding(const int64_t *windows, int64_t n, const struct tables *of, float *out) {
    for (int64_t row = 0; row < n; row++) embed(windows + row * of->width, of, out + row * of->size);
}
