/* Several bytes of each request in one call, on a CPU, fp32: as many single rows one after another. multi_step.py says
 * what a step computes.
 *
 * Threads share the requests, and each makes all of its steps before the next begins: nobody waits for another's
 * step. Every row is computed as if it were alone, so threads do not change a result.
 */
#include <omp.h>
#include <stdlib.h>

#include "export.h"
#include "single_rows.h"

/* Makes the bytes of all requests; what is `spent` becomes that of a thread. Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_multi_step(const struct part *parts, const struct requests *of, const struct latents *latents,
                              const struct choice *choice, const struct rule *rule, int64_t threads,
                              struct spent *spent) {
    struct context with = {.parts = parts, .latents = latents, .choice = choice};
    int64_t size = 0, most = 0, scratch = scratch_floats(parts);
    for (int64_t i = 0; i < MODULES; i++) size = parts[i].module->size > size ? parts[i].module->size : size;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < of->count ? threads : of->count;
    for (int64_t r = 0; r < of->count; r++)
        if (of->opened[r] < 0 && of->scans[r] > most) most = of->scans[r];
    /* The rows beside the steps begin when these have ended, in the same memory. */
    int64_t stepping = size + scratch + choice->vocabulary, beside = most * (size + 1);
    int64_t floats = stepping > beside ? stepping : beside;
    int64_t share = floats * sizeof(float) + 3 * most * sizeof(int32_t);
    char *memory = malloc(apart * share);
    if (!memory) return 1;
    struct spent all = {0};
    int failed = 0;
#pragma omp parallel for num_threads(apart) schedule(dynamic, 1) if (apart > 1) \
    reduction(| : failed) reduction(add : all)
    for (int64_t r = 0; r < of->count; r++) {
        float *x = (float *)(memory + omp_get_thread_num() * share);
        int32_t *ints = (int32_t *)(x + floats);
        struct row_room room = {
            .x = x,
            .scratch = x + size,
            .logits = x + size + scratch,
            .beside = {.owners = ints, .positions = ints + most, .highs = ints + 2 * most},
            .most = most,
        };
        failed |= single_rows(&with, of, rule, r, apart > 1 ? 1 : threads, &room, &all);
    }
    for (int64_t i = 0; i <= MODULES; i++) all.seconds[i] /= apart;
    *spent = all;
    free(memory);
    return failed;
}
