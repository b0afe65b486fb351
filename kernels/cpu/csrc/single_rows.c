/* One request goes through all of its steps before the next: what it has in its windows then stays in the
 * processor's caches from step to step. Several at once would read weights less often, but their windows are larger
 * than the modules. */
#include "single_rows.h"

#include <string.h>

#include "dense.h"

/* A request on its way. */
struct walk {
    const struct context *with;
    const struct requests *of;
    const struct rule *rule;
    const struct row_room *room;
    struct spent *spent;
    int64_t r;
};

int64_t scratch_floats(const struct part *parts) {
    int64_t most = 0;
    for (int64_t i = 0; i < MODULES; i++) {
        int64_t own = floats_of(parts[i].module, 1, 1);
        most = own > most ? own : most;
    }
    return most;
}

/* The row at a position through a module; the decoder's reads `latents`. */
static int one_pass(const struct walk *w, int module, int32_t position, const struct latents *latents, float *entropy) {
    const struct part *part = w->with->parts + module;
    double began = seconds();
    int32_t high = position + 1;
    struct places at = *part->at;
    at.rows = w->of->owners + w->r;
    at.positions = at.firsts = &position;
    at.highs = &high;
    struct sink to = *part->to;
    to.entropies = entropy;
    struct pass pass = {
        .module = part->module,
        .caches = part->caches,
        .at = &at,
        .latents = latents,
        .from = part->from,
        .to = &to,
        .x = w->room->x,
        .queries = w->room->scratch,
    };
    int failed = go_through(&pass, 0, 1, w->room->scratch + floats_of(part->module, 1, 0));
    w->spent->seconds[module] += seconds() - began;
    return failed;
}

/* The decoder's row before `position`, and from it the byte there, which goes into the request's text. */
static int next_byte(const struct walk *w, int32_t position, int64_t *id, uint8_t *bad) {
    const struct requests *of = w->of;
    const struct choice *by = w->with->choice;
    struct latents read = *w->with->latents;
    read.slots = of->latents + w->r;
    int failed = one_pass(w, DECODER, position - 1, &read, NULL);
    linear_map(w->room->x, 1, w->with->parts[DECODER].module->size, by->head,
               (struct target){.out = w->room->logits, .size = by->vocabulary});
    int64_t where = position;
    struct choosers rows = {.logits = w->room->logits, .owners = of->owners + w->r, .positions = &where, .n = 1};
    choose_rows(by, &rows, id, NULL, NULL, bad);
    by->texts[of->owners[w->r] * by->stride + position] = of->ids[w->r * of->most + of->made[w->r]++] = *id;
    of->bad[w->r] |= *bad;
    return failed;
}

/* Scans the byte at a position. */
static int scan(const struct walk *w, int32_t position, float *entropy) {
    int failed = one_pass(w, PATCHER, position, NULL, entropy);
    w->of->entropies[w->r * w->of->most + w->of->scanned[w->r]++] = *entropy;
    return failed;
}

/* Whether a patch closes behind the byte at a position. */
static int closes(const struct walk *w, int32_t position, float entropy) {
    int64_t length = position + 1 - w->of->opened[w->r];
    return entropy > w->rule->threshold || (w->rule->longest && length >= w->rule->longest);
}

/* A whole draft through the entropy model, and its last byte through the encoder, from whose state a verification
 * begins. */
static int go_ahead(const struct walk *w, int64_t threads) {
    const struct requests *of = w->of;
    const struct part *parts = w->with->parts;
    struct stretch rows = w->room->beside;
    float *x = w->room->x, *entropies = x + w->room->most * parts[PATCHER].module->size;
    int32_t owner = of->owners[w->r], count = of->scans[w->r], end = of->starts[w->r] + of->limits[w->r] + 1;
    rows.n = 0;
    add_stretch(&rows, owner, end - count, end);
    int failed = pass_along(parts, PATCHER, &rows, SCANNED_ROWS, threads, x, entropies, w->spent);
    memcpy(of->entropies + w->r * of->most, entropies, sizeof(float) * count);
    of->scanned[w->r] = count;
    rows.n = 0;
    if (w->rule->encoder_input) add_stretch(&rows, owner, end - 1, end);
    return failed | pass_along(parts, ENCODER, &rows, AHEAD_ROWS, threads, x, NULL, w->spent);
}

int single_rows(const struct context *with, const struct requests *of, const struct rule *rule, int64_t r,
                int64_t threads, const struct row_room *room, struct spent *spent) {
    struct walk w = {.with = with, .of = of, .rule = rule, .room = room, .spent = spent, .r = r};
    int drafting = of->opened[r] < 0, failed = 0;
    int32_t position = of->starts[r];
    double began = seconds();
    if (of->fresh[r]) {
        failed |= one_pass(&w, ENCODER, position, NULL, NULL);
        spent->rows[FRESH_ROWS]++;
    }
    for (;;) {
        int64_t id;
        uint8_t bad;
        float entropy = 0.0f;
        failed |= next_byte(&w, ++position, &id, &bad);
        /* A draft goes on whatever it says: verification ends a text. */
        if (!drafting) {
            if (bad || id == with->choice->eos || of->scanned[r] >= of->scans[r]) break;
            failed |= scan(&w, position, &entropy);
            if (closes(&w, position, entropy)) break;
        }
        if (of->made[r] >= of->limits[r]) break;
        /* A drafted row may start from its id; the states of bytes that stay are pooled later. */
        if (rule->encoder_input || !drafting) failed |= one_pass(&w, ENCODER, position, NULL, NULL);
    }
    if (drafting && of->scans[r]) failed |= go_ahead(&w, threads);
    spent->seconds[MODULES] += seconds() - began;
    return failed;
}
