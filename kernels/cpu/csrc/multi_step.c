/* Several bytes of each request in one call, on a CPU, fp32: as many single rows one after another. multi_step.py says
 * what a step computes.
 *
 * Threads share the requests, and each makes all of its steps before the next begins: nobody waits for another's
 * step. Every row is computed as if it were alone, so threads do not change a result.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "export.h"
#include "single_rows.h"
#include "team.h"

/* The requests of a call, and a room for each that is on its way, of which a part is what was spent there. */
struct stepping {
    const struct context *with;
    const struct requests *of;
    const struct rule *rule;
    int64_t threads, size, scratch, floats, most, room;
    char *memory;
    _Atomic int failed;
};

static void step_request(void *with, int64_t r, int64_t room) {
    struct stepping *all = with;
    struct spent *spent = (struct spent *)(all->memory + room * all->room);
    float *x = (float *)(spent + 1);
    int32_t *ints = (int32_t *)(x + all->floats);
    struct row_room own = {
        .x = x,
        .scratch = x + all->size,
        .logits = x + all->size + all->scratch,
        .beside = {.owners = ints, .positions = ints + all->most, .highs = ints + 2 * all->most},
        .most = all->most,
    };
    if (single_rows(all->with, all->of, all->rule, r, all->threads, &own, spent)) all->failed = 1;
}

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
    /* Of whole eights of bytes, for the room behind it. */
    int64_t room = (sizeof(struct spent) + floats * sizeof(float) + 3 * most * sizeof(int32_t) + 7) / 8 * 8;
    char *memory = malloc(rooms_for(apart) * room);
    if (!memory) return 1;
    struct stepping all = {
        .with = &with,
        .of = of,
        .rule = rule,
        .threads = apart > 1 ? 1 : threads,
        .size = size,
        .scratch = scratch,
        .floats = floats,
        .most = most,
        .room = room,
        .memory = memory,
    };
    for (int64_t i = 0; i < rooms_for(apart); i++) *(struct spent *)(memory + i * room) = (struct spent){0};
    share_out(step_request, &all, of->count, apart);
    *spent = (struct spent){0};
    for (int64_t i = 0; i < rooms_for(apart); i++) add_spent(spent, (struct spent *)(memory + i * room));
    for (int64_t i = 0; i <= MODULES; i++) spent->seconds[i] /= apart;
    free(memory);
    return all.failed;
}
