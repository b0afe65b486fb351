/* Byte plus hashed n-gram embeddings on a CPU, fp32. The mathematics and the shapes stand in hash_embedding.py. */
#include <stdint.h>
#include <string.h>

void fastblt_hash_embedding(const int64_t *windows, int64_t n, int64_t width, const int64_t *powers, int64_t tables,
                            int64_t vocab, const float *byte_table, const float *hash_table, int64_t size,
                            float *restrict out) {
    for (int64_t row = 0; row < n; row++, windows += width, out += size) {
        for (int64_t i = 0; i < size; i++) out[i] = 0.0f;
        for (int64_t t = 0; t < tables; t++) {
            /* Wrapping products are unsigned ones; what they wrap to is signed, and its remainder is not negative. */
            uint64_t sum = 0;
            for (int64_t j = 0; j < width; j++) sum += (uint64_t)windows[j] * (uint64_t)powers[t * width + j];
            int64_t hash = (int64_t)sum % vocab;
            if (hash < 0) hash += vocab;
            const float *entry = hash_table + (t * vocab + hash) * size;
            for (int64_t i = 0; i < size; i++) out[i] += entry[i];
        }
        const float *own = byte_table + windows[width - 1] * size;
        for (int64_t i = 0; i < size; i++) out[i] += own[i];
    }
}
