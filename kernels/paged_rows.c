/* Rows of numbers kept in pages, on a CPU, fp32. The shapes stand in paged_rows.py. */
#include <stdint.h>
#include <string.h>

#include "paged_rows.h"

void fastblt_read_rows(const float *store, const struct pages *pages, const int32_t *owners, const int32_t *positions,
                       int64_t n, int64_t size, float *out) {
    for (int64_t i = 0; i < n; i++)
        memcpy(out + i * size, store + slot_of(pages, owners[i], positions[i]) * size, sizeof(float) * size);
}

void fastblt_write_rows(const float *rows, const struct pages *pages, const int32_t *owners, const int32_t *positions,
                        int64_t n, int64_t size, float *store) {
    for (int64_t i = 0; i < n; i++)
        memcpy(store + slot_of(pages, owners[i], positions[i]) * size, rows + i * size, sizeof(float) * size);
}
