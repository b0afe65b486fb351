/* Several bytes of each request in one call, on a CPU, fp32: as many single rows one after another. What a step computes
 * stands in multi_step.py.
 *
 * Threads share the requests in groups, and a group makes all of its steps before the next begins: what its requests have
 * in their windows is then read from memory once and not once a byte, and nobody waits for another's step. Every row is
 * computed as if it were alone, so neither groups nor threads change a result.
 */
#include "choice.h"
#include "stack.c"
#include "part.h"
#include "single_rows.h"

/* Makes the bytes of all requests; what is `spent` becomes that of a thread. Returns 0, or 1 when memory ran out. */
int fastblt_multi_step(const struct part *parts, const struct requests *of, const struct latents *latents,
                       const struct choice *by, const struct rule *rule, int64_t threads, struct spent *spent) {
    int64_t size = 0, each, stepping = step_floats(parts, by->vocabulary, &each), groups = (of->count + GROUP - 1) / GROUP;
    for (int64_t i = 0; i < MODULES; i++) size = parts[i].module->size > size ? parts[i].module->size : size;
    /* Each thread its share, as far as there are requests. */
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < of->count ? threads : of->count, most = 0;
    groups = (groups + apart - 1) / apart * apart;
    if (groups > of->count) groups = of->count;
    for (int64_t g = 0; g < groups; g++) {
        int64_t rows = 0;
        for (int64_t r = of->count * g / groups; r < of->count * (g + 1) / groups; r++)
            rows += of->opened[r] < 0 ? of->scans[r] : 0;
        most = rows > most ? rows : most;
    }
    stepping += GROUP * size;
    int64_t ahead = most * (size + 1), floats = stepping > ahead ? stepping : ahead;
    int64_t room = floats * sizeof(float) + 3 * most * sizeof(int32_t);
    char *memory = malloc(apart * room);
    if (!memory) return 1;
    struct spent all = {0};
    int failed = 0;
#pragma omp parallel for num_threads(apart) schedule(dynamic, 1) if (apart > 1) reduction(| : failed) reduction(add : all)
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = of->count * g / groups, n = of->count * (g + 1) / groups - first;
        float *x = (float *)(memory + omp_get_thread_num() * room), *scratch = x + GROUP * size;
        int32_t *ints = (int32_t *)(x + floats);
        struct stretch rows = {ints, ints + most, ints + 2 * most, most};
        failed |= single_rows(parts, of, latents, by, rule, first, n, scratch, x, scratch + GROUP * each,
                              apart > 1 ? 1 : threads, &rows, &all);
    }
    for (int64_t i = 0; i <= MODULES; i++) all.seconds[i] /= apart;
    *spent = all;
    free(memory);
    return failed;
}
