/* Verification of drafts: verification.py has the definition and the shapes. */
#include <stdint.h>

#include "export.h"

EXPORT void fastblt_verify(const int64_t *targets, const int64_t *drafts, const int64_t *lengths, int64_t n,
                           int64_t longest, int64_t *accepted, int64_t *next) {
    for (int64_t i = 0; i < n; i++, targets += longest + 1, drafts += longest) {
        int64_t count = 0;
        while (count < lengths[i] && drafts[count] == targets[count]) count++;
        accepted[i] = count;
        next[i] = targets[count];
    }
}
