/* Several bytes of each request in one call, on a CPU, fp32: as many single rows one after another. What a step computes
 * stands in multi_step.py.
 *
 * Threads share the requests, and each makes all of its steps before the next begins: what it has in its windows is then
 * read from memory once and not once a byte, and nobody waits for another's step. Every row is computed as if it were
 * alone, so threads do not change a result.
 */
#include "choice.h"
#include "stack.c"
#include "part.h"
#include "single_rows.h"

/* Makes the bytes of all requests; what is `spent` becomes that of a thread. Returns 0, or 1 when memory ran out. */
int fastblt_multi_step(const struct part *parts, const struct requests *of, const struct latents *latents,
                       const struct choice *by, const struct rule *rule, int64_t threads, struct spent *spent) {
    int64_t size = 0, most = 0, each, stepping = step_floats(parts, by->vocabulary, &each);
    for (int64_t i = 0; i < MODULES; i++) size = parts[i].module->size > size ? parts[i].module->size : size;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < of->count ? threads : of->count;
    for (int64_t r = 0; r < of->count; r++)
        if (of->opened[r] < 0 && of->scans[r] > most) most = of->scans[r];
    stepping += size;
    int64_t ahead = most * (size + 1), floats = stepping > ahead ? stepping : ahead;
    int64_t room = floats * sizeof(float) + 3 * most * sizeof(int32_t);
    char *memory = malloc(apart * room);
    if (!memory) return 1;
    struct spent all = {0};
    int failed = 0;
#pragma omp parallel for num_threads(apart) schedule(dynamic, 1) if (apart > 1) reduction(| : failed) reduction(add : all)
    for (int64_t r = 0; r < of->count; r++) {
        float *x = (float *)(memory + omp_get_thread_num() * room), *scratch = x + size;
        int32_t *ints = (int32_t *)(x + floats);
        struct stretch rows = {ints, ints + most, ints + 2 * most, most};
        failed |= single_rows(parts, of, latents, by, rule, r, scratch, x, scratch + each, apart > 1 ? 1 : threads, &rows,
                              &all);
    }
    for (int64_t i = 0; i <= MODULES; i++) all.seconds[i] /= apart;
    *spent = all;
    free(memory);
    return failed;
}
