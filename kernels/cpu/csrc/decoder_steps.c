/* A pass of the decoder and the choice of bytes from it, all further passes that fill blocks (block_steps.c), and the
 * drafts behind verifications (follow.c), in one call, on a CPU, fp32. decoder_steps.py says what a step does.
 *
 * Threads share the requests in groups, and a group makes all of its steps before the next begins; a group that is
 * alone shares out the rows of each pass. Every row is computed as if it were alone, so neither changes a result.
 */
#include "decoder_steps.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "export.h"
#include "team.h"

/* The call, column by column. */
static struct plans plans_of(const struct call *call) {
    int64_t n = call->count;
    const int32_t *asked = call->asked, *reads = asked + COLUMNS * n;
    return (struct plans){
        .count = n,
        .owners = asked + OWNERS * n,
        .starts = asked + STARTS * n,
        .causals = asked + CAUSALS * n,
        .selects = asked + SELECTS * n,
        .sizes = asked + SIZES * n,
        .latents = asked + LATENTS * n,
        .runs = asked + RUNS * n,
        .rules = asked + RULES * n,
        .lasts = asked + LASTS * n,
        .mosts = asked + MOSTS * n,
        .encoded = asked + ENCODED * n,
        .scanned = asked + SCANNED * n,
        .untils = asked + UNTILS * n,
        .follows = asked + FOLLOWS * n,
        .lefts = asked + LEFTS * n,
        .filtered = asked + FILTERED * n,
        .bounds = call->bounds,
        .allowed = call->allowed,
        .reads = reads,
        .blocks = reads + 2 * call->runs,
        .mask = call->mask,
        .encoder_input = call->encoder_input,
        .chosen = call->chosen,
        .selected = call->selected,
        .accepted = call->accepted,
        .lines = call->lines,
        .made = call->made,
        .drafts = call->drafts,
    };
}

/* Takes `bytes` of `memory`, of which *used are taken; without memory it only counts. */
static void *take(char *memory, int64_t *used, int64_t bytes) {
    void *taken = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return taken;
}

/* Room for passes of `rows` rows in `memory`, which may be NULL to know how many bytes that takes. */
static int64_t room_in(char *memory, const struct context *with, int64_t rows, struct room *room) {
    const struct part *parts = with->parts;
    int64_t size = 0, used = 0, vocabulary = with->choice->vocabulary;
    int64_t ints = sizeof(int32_t) * rows, longs = sizeof(int64_t) * rows, floats = sizeof(float) * rows;
    for (int64_t i = 0; i < MODULES; i++) size = parts[i].module->size > size ? parts[i].module->size : size;
    *room = (struct room){
        .owners = take(memory, &used, ints),
        .positions = take(memory, &used, ints),
        .firsts = take(memory, &used, ints),
        .highs = take(memory, &used, ints),
        .latents = take(memory, &used, ints),
        .block = take(memory, &used, ints),
        /* Behind states of rows beside the steps stand their entropies. */
        .x = take(memory, &used, floats * (size + 1)),
        .choosers = take(memory, &used, ints),
        .masks = take(memory, &used, sizeof(const uint8_t *) * rows),
        .targets = take(memory, &used, longs),
        .ids = take(memory, &used, longs),
        .states = take(memory, &used, floats * size),
        .logits = take(memory, &used, floats * vocabulary),
        .confidences = take(memory, &used, floats),
        .entropies = take(memory, &used, floats),
        .bad = take(memory, &used, rows),
    };
    room->single = (struct row_room){
        .x = room->x,
        .scratch = take(memory, &used, sizeof(float) * scratch_floats(parts)),
        .logits = take(memory, &used, sizeof(float) * vocabulary),
        .beside = {.owners = room->owners, .positions = room->positions, .highs = room->highs},
        .most = rows,
    };
    return used;
}

/* Cuts `count` requests into groups that begin at starts[0], starts[1], ...; returns how many. The last ones are
 * small, so that no thread waits long for another's. */
static int64_t cut_groups(int64_t count, int64_t threads, int32_t *starts) {
    int64_t groups = 0;
    for (int64_t at = 0; at < count; groups++) {
        int64_t each = (count - at + 2 * threads - 1) / (2 * threads);
        starts[groups] = (int32_t)at;
        at += each < GROUP ? each : GROUP;
    }
    starts[groups] = (int32_t)count;
    return groups;
}

/* Most rows of a pass of requests [first, last): of the decoder, of those beside its steps, or of the drafts behind. */
static int64_t most_rows(const struct plans *of, int64_t first, int64_t last) {
    int64_t rows = 0, beside = 0, behind = 0;
    for (int64_t r = first; r < last; r++) {
        int32_t from = of->scanned[r] < of->encoded[r] ? of->scanned[r] : of->encoded[r];
        int32_t end = end_of(of, r), until = of->untils[r] > end ? of->untils[r] : end;
        rows += of->causals[r] + of->sizes[r];
        beside += until > from ? until - from : 0;
        behind += of->follows[r] ? 1 + of->follows[r] : 0;
    }
    rows = beside > rows ? beside : rows;
    return behind > rows ? behind : rows;
}

/* The groups of a call, and a room for each that is on its way. */
struct grouped {
    const struct context *with;
    const struct plans *of;
    const int32_t *starts;
    int64_t threads, most, room;
    char *memory;
    struct spent *spent;
    _Atomic int failed;
};

static void step_group(void *with, int64_t g, int64_t number) {
    struct grouped *all = with;
    struct room room;
    int64_t first = all->starts[g], n = all->starts[g + 1] - first;
    room_in(all->memory + number * all->room, all->with, all->most, &room);
    struct task task = {
        .with = all->with,
        .of = all->of,
        .room = &room,
        .threads = all->threads,
        .spent = all->spent + number,
    };
    int failed = block_steps(&task, first, n);
    if (failed | follow(&task, first, n)) all->failed = 1;
}

/* Makes the steps of all requests; what is `spent` becomes that of a thread. Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_decoder_steps(const struct part *parts, const struct call *call, const struct latents *latents,
                                 const struct choice *choice, int64_t threads, struct spent *spent) {
    struct context with = {.parts = parts, .latents = latents, .choice = choice};
    struct plans plans = plans_of(call);
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < plans.count ? threads : plans.count, most = 0;
    int32_t *starts = malloc(sizeof(int32_t) * (plans.count + 1));
    if (!starts) return 1;
    int64_t groups = cut_groups(plans.count, apart, starts);
    for (int64_t g = 0; g < groups; g++) {
        int64_t rows = most_rows(&plans, starts[g], starts[g + 1]);
        most = rows > most ? rows : most;
    }
    int64_t room = room_in(NULL, &with, most, &(struct room){0}), rooms = rooms_for(apart);
    char *memory = malloc(rooms * room);
    struct spent *each = calloc(rooms, sizeof *each);
    struct grouped all = {
        .with = &with,
        .of = &plans,
        .starts = starts,
        .threads = groups > 1 ? 1 : threads,
        .most = most,
        .room = room,
        .memory = memory,
        .spent = each,
        .failed = !memory || !each,
    };
    if (!all.failed) share_out(step_group, &all, groups, apart);
    *spent = (struct spent){0};
    for (int64_t i = 0; each && i < rooms; i++) add_spent(spent, each + i);
    for (int64_t i = 0; i <= MODULES; i++) spent->seconds[i] /= groups > 1 ? apart : 1;
    free(each);
    free(memory);
    free(starts);
    return all.failed;
}
