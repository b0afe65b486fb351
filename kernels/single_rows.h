/* Single rows of requests one after another, each over the byte that the one before it gave: drafts of BLT-S, patches of
 * BLT. What a step computes stands in multi_step.py; behind choice.h, stack.c and part.h. */
#pragma once

/* Requests that a thread takes through their steps together: few enough for their keys and values to stay in the caches
 * from step to step, and for nobody to wait long for another's. */
#define GROUP 4

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

/* The rows of one step. */
struct step {
    int32_t owners[GROUP], positions[GROUP], highs[GROUP], latents[GROUP], request[GROUP];
    int64_t n;
};

static int one_pass(const struct part *parts, int module, const struct step *s, const struct latents *latents,
                    float *entropies, float *scratch, float *x, struct spent *spent) {
    const struct part *part = parts + module;
    double began = now();
    struct places at = *part->at;
    at.rows = s->owners, at.positions = at.firsts = s->positions, at.highs = s->highs;
    struct sink to = *part->to;
    to.entropies = entropies;
    int failed = run(part->module, part->caches, &at, latents, part->from, &to, 0, s->n, 0, scratch, x);
    spent->seconds[module] += now() - began;
    return failed;
}

static void join(struct step *to, const struct step *from, int64_t j, int32_t further) {
    int64_t k = to->n++;
    to->owners[k] = from->owners[j], to->latents[k] = from->latents[j], to->request[k] = from->request[j];
    to->positions[k] = from->positions[j] + further, to->highs[k] = to->positions[k] + 1;
}

/* The first rows that the encoder has not had. */
static int encode_first(const struct part *parts, const struct requests *of, const struct step *s, float *scratch, float *x,
                        struct spent *spent) {
    struct step fresh = {.n = 0};
    for (int64_t j = 0; j < s->n; j++)
        if (of->fresh[s->request[j]]) join(&fresh, s, j, 0);
    spent->rows[FRESH] += fresh.n;
    return fresh.n && one_pass(parts, ENCODER, &fresh, NULL, NULL, scratch, x, spent);
}

/* Whole drafts of requests [first, first + n) through the entropy model, and their last bytes through the encoder, from
 * whose states a verification begins. */
static int go_ahead(const struct part *parts, const struct requests *of, const struct rule *rule, int64_t first, int64_t n,
                    int64_t threads, const struct stretch *room, float *x, struct spent *spent) {
    struct stretch scan = *room, last = *room;
    float *entropies = x + room->n * parts[PATCHER].module->size;
    scan.n = 0;
    for (int64_t r = first; r < first + n; r++) {
        int32_t end = of->starts[r] + of->limits[r] + 1;
        if (of->opened[r] < 0) stretch_to(&scan, of->owners[r], end - of->scans[r], end);
    }
    int failed = pass_along(parts, PATCHER, &scan, SCANNED, threads, x, entropies, spent);
    last.n = 0;
    for (int64_t r = first; r < first + n; r++) {
        if (of->opened[r] >= 0 || !of->scans[r]) continue;
        int32_t end = of->starts[r] + of->limits[r] + 1;
        memcpy(of->entropies + r * of->most, entropies, sizeof(float) * of->scans[r]);
        entropies += of->scanned[r] = of->scans[r];
        if (rule->fed) stretch_to(&last, of->owners[r], end - 1, end);
    }
    return failed | pass_along(parts, ENCODER, &last, AHEAD, threads, x, NULL, spent);
}

/* Chooses the bytes of a step's rows from their decoder states x. */
static void choose_bytes(const struct choice *by, const struct step *s, int64_t size, const float *x, float *logits,
                   int64_t *ids, uint8_t *bad) {
    int64_t positions[GROUP];
    map(x, s->n, size, by->head, (struct target){logits, NULL, by->vocabulary, 0});
    for (int64_t j = 0; j < s->n; j++) positions[j] = s->positions[j] + 1;
    choose_rows(by, logits, s->owners, positions, s->n, ids, NULL, NULL, bad);
}

/* Floats that a step's rows take beside their states: `each` is the most of a row in any module. */
static int64_t step_floats(const struct part *parts, int64_t vocabulary, int64_t *each) {
    *each = 0;
    for (int64_t i = 0; i < MODULES; i++) {
        const struct module *m = parts[i].module;
        int64_t own = 2 * (m->heads + m->kv_heads) * m->dim;
        *each = own > *each ? own : *each;
    }
    return GROUP * (*each + vocabulary + PANEL);
}

/* Requests [first, first + n) to the end of their steps; behind `scratch` for a step's rows is their logits' place.
 * Returns 0, or 1 when memory ran out. */
static int single_rows(const struct part *parts, const struct requests *of, const struct latents *latents,
                       const struct choice *by, const struct rule *rule, int64_t first, int64_t n, float *scratch,
                       float *x, float *logits, int64_t threads, const struct stretch *room, struct spent *spent) {
    struct step now_, scan, next;
    struct latents read = *latents;
    int64_t ids[GROUP];
    float entropies[GROUP];
    uint8_t bad[GROUP];
    int failed = 0;
    double began = now();
    read.slots = now_.latents;
    now_.n = 0;
    for (int64_t r = first; r < first + n; r++) {
        int64_t k = now_.n++;
        now_.owners[k] = of->owners[r], now_.latents[k] = of->latents[r], now_.request[k] = (int32_t)r;
        now_.positions[k] = of->starts[r], now_.highs[k] = of->starts[r] + 1;
    }
    failed |= encode_first(parts, of, &now_, scratch, x, spent);
    while (now_.n) {
        failed |= one_pass(parts, DECODER, &now_, &read, NULL, scratch, x, spent);
        choose_bytes(by, &now_, parts[DECODER].module->size, x, logits, ids, bad);
        scan.n = next.n = 0;
        for (int64_t j = 0; j < now_.n; j++) {
            int64_t r = now_.request[j], p = now_.positions[j] + 1, made = of->made[r]++;
            by->texts[now_.owners[j] * by->stride + p] = of->ids[r * of->most + made] = ids[j];
            of->bad[r] |= bad[j];
            /* A draft goes on whatever it says: verification ends a text. */
            if (of->opened[r] < 0) {
                if (made + 1 < of->limits[r]) join(&next, &now_, j, 1);
            } else if (!bad[j] && ids[j] != by->eos && made < of->scans[r]) {
                join(&scan, &now_, j, 1);
            }
        }
        if (scan.n) failed |= one_pass(parts, PATCHER, &scan, NULL, entropies, scratch, x, spent);
        for (int64_t j = 0; j < scan.n; j++) {
            int64_t r = scan.request[j], length = scan.positions[j] + 1 - of->opened[r];
            of->entropies[r * of->most + of->scanned[r]++] = entropies[j];
            int closed = entropies[j] > rule->threshold || (rule->longest && length >= rule->longest);
            if (!closed && of->made[r] < of->limits[r]) join(&next, &scan, j, 0);
        }
        now_ = next;
        if (rule->fed) {
            if (now_.n) failed |= one_pass(parts, ENCODER, &now_, NULL, NULL, scratch, x, spent);
        } else {
            /* A drafted row starts from its id; the states of a fixed one are pooled later. */
            scan.n = 0;
            for (int64_t j = 0; j < now_.n; j++)
                if (of->opened[now_.request[j]] >= 0) join(&scan, &now_, j, 0);
            if (scan.n) failed |= one_pass(parts, ENCODER, &scan, NULL, NULL, scratch, x, spent);
        }
    }
    failed |= go_ahead(parts, of, rule, first, n, threads, room, x, spent);
    spent->seconds[MODULES] += now() - began;
    return failed;
}
