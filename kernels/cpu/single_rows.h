/* Single rows of a request one after another, each over the byte that the one before it gave: drafts of BLT-S, patches of
 * BLT. What a step computes stands in multi_step.py; behind choice.h, stack.c and part.h.
 *
 * One request goes through all of its steps before the next: what it has in its windows then stays in the caches from step
 * to step. Several at once would read weights less often, but their windows are larger than the modules. */
#pragma once

/* By request in the order of the call: where it stands, what it may do, and what became of it. */
struct requests {
    const int32_t *owners, *starts, *latents, *limits, *scans, *opened, *fresh;
    int32_t *made, *scanned;
    int64_t *ids;
    float *entropies;
    uint8_t *bad;
    int64_t count, most;
};

/* A patch closes behind a byte of a higher entropy, or of so many bytes (0: any number). `fed`: drafted rows begin as
 * encoder states. */
struct rule {
    double threshold;
    int64_t longest, fed;
};

/* The row of a request at a position through a module. */
static int one_pass(const struct part *parts, int module, const struct requests *of, int64_t r, int32_t position,
                    const struct latents *latents, float *entropy, float *scratch, float *x, struct spent *spent) {
    const struct part *part = parts + module;
    double began = now();
    int32_t high = position + 1;
    struct places at = *part->at;
    at.rows = of->owners + r, at.positions = at.firsts = &position, at.highs = &high;
    struct sink to = *part->to;
    to.entropies = entropy;
    struct pass p = {part->module, part->caches, &at, latents, part->from, &to, x, scratch};
    int failed = go_through(&p, 0, 1, scratch + floats_of(p.module, 1, 0));
    spent->seconds[module] += now() - began;
    return failed;
}

/* A whole draft through the entropy model, and its last byte through the encoder, from whose state a verification
 * begins. */
static int go_ahead(const struct part *parts, const struct requests *of, const struct rule *rule, int64_t r,
                    int64_t threads, const struct stretch *room, float *x, struct spent *spent) {
    struct stretch rows = *room;
    float *entropies = x + room->n * parts[PATCHER].module->size;
    int32_t end = of->starts[r] + of->limits[r] + 1;
    rows.n = 0, stretch_to(&rows, of->owners[r], end - of->scans[r], end);
    int failed = pass_along(parts, PATCHER, &rows, SCANNED, threads, x, entropies, spent);
    memcpy(of->entropies + r * of->most, entropies, sizeof(float) * of->scans[r]);
    of->scanned[r] = of->scans[r];
    rows.n = 0, stretch_to(&rows, of->owners[r], rule->fed ? end - 1 : end, end);
    return failed | pass_along(parts, ENCODER, &rows, AHEAD, threads, x, NULL, spent);
}

/* Floats that a row takes beside its state: of any module, `each`, and its logits. */
static int64_t step_floats(const struct part *parts, int64_t vocabulary, int64_t *each) {
    *each = 0;
    for (int64_t i = 0; i < MODULES; i++) {
        int64_t own = floats_of(parts[i].module, 1, 1);
        *each = own > *each ? own : *each;
    }
    return *each + vocabulary + PANEL;
}

/* Request r to the end of its steps; behind what a row takes of `scratch` is its logits' place. Returns 0, or 1 when memory
 * ran out. */
static int single_rows(const struct part *parts, const struct requests *of, const struct latents *latents,
                       const struct choice *by, const struct rule *rule, int64_t r, float *scratch, float *x,
                       float *logits, int64_t threads, const struct stretch *room, struct spent *spent) {
    struct latents read = *latents;
    int32_t position = of->starts[r];
    int drafting = of->opened[r] < 0, failed = 0;
    double began = now();
    read.slots = of->latents + r;
    if (of->fresh[r]) {
        failed |= one_pass(parts, ENCODER, of, r, position, NULL, NULL, scratch, x, spent);
        spent->rows[FRESH]++;
    }
    for (;;) {
        failed |= one_pass(parts, DECODER, of, r, position, &read, NULL, scratch, x, spent);
        int64_t id, behind = ++position, made = of->made[r]++;
        uint8_t bad;
        map(x, 1, parts[DECODER].module->size, by->head, (struct target){logits, NULL, by->vocabulary, 0});
        choose_rows(by, logits, of->owners + r, &behind, 1, &id, NULL, NULL, &bad);
        by->texts[of->owners[r] * by->stride + position] = of->ids[r * of->most + made] = id;
        of->bad[r] |= bad;
        if (drafting) {
            /* A draft goes on whatever it says: verification ends a text. */
            if (made + 1 >= of->limits[r]) break;
        } else {
            if (bad || id == by->eos || made >= of->scans[r]) break;
            float entropy;
            failed |= one_pass(parts, PATCHER, of, r, position, NULL, &entropy, scratch, x, spent);
            of->entropies[r * of->most + of->scanned[r]++] = entropy;
            int64_t length = position + 1 - of->opened[r];
            if (entropy > rule->threshold || (rule->longest && length >= rule->longest)) break;
            if (made + 1 >= of->limits[r]) break;
        }
        /* A drafted row may start from its id; the states of a fixed one are pooled later. */
        if (rule->fed || !drafting)
            failed |= one_pass(parts, ENCODER, of, r, position, NULL, NULL, scratch, x, spent);
    }
    if (drafting && of->scans[r]) failed |= go_ahead(parts, of, rule, r, threads, room, x, spent);
    spent->seconds[MODULES] += now() - began;
    return failed;
}
