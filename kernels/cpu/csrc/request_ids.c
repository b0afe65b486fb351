/* Reading and writing the ids of requests, which begin at their first position: request_ids.py has the shapes. */
#include <stdint.h>

#include "export.h"

EXPORT void fastblt_read_ids(const int64_t *ids, int64_t stride, const int32_t *owners, const int32_t *positions,
                             int64_t n, int64_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = ids[owners[i] * stride + positions[i]];
}

EXPORT void fastblt_write_ids(int64_t *ids, int64_t stride, const int32_t *owners, const int32_t *positions, int64_t n,
                              const int64_t *values) {
    for (int64_t i = 0; i < n; i++) ids[owners[i] * stride + positions[i]] = values[i];
}
