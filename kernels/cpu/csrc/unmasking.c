/* One step of unmasking on a CPU: which positions become bytes. */
#include "unmasking.h"

#include <string.h>

#include "export.h"

EXPORT void fastblt_pick(int32_t rule, float bound, const float *confidences, const float *entropies, int64_t count,
                         uint8_t *picked) {
    if (rule == BY_CONFIDENCE) {
        int64_t best = 0;
        float most = -1.0f;
        for (int64_t i = 0; i < count; i++) {
            float value = confidences[i] == confidences[i] ? confidences[i] : 0.0f;
            picked[i] = value > bound;
            if (value > most) {
                most = value;
                best = i;
            }
        }
        picked[best] = 1;
        return;
    }
    double total = 0.0, before = 0.0;
    memset(picked, 0, count);
    uint8_t seen[count];
    memset(seen, 0, count);
    for (int64_t k = 0; k < count; k++) {
        int64_t next = -1;
        float least = 0.0f;
        for (int64_t i = 0; i < count; i++) {
            float value = entropies[i] == entropies[i] ? entropies[i] : 3.402823466e+38f;
            if (!seen[i] && (next < 0 || value < least)) {
                least = value;
                next = i;
            }
        }
        seen[next] = 1;
        before = total;
        total += least;
        picked[next] = !k || (rule == EXCLUSIVE_MAX ? before : total) <= bound;
    }
}
