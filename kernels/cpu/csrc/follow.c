/* The drafts behind verifications, within the call that verified, and those that a call is for: blocks, single rows, or
 * blocks that the decoder filters. */
#include "drafts.h"

static void add_draft(struct drafts *to, const struct plans *of, int64_t r, int32_t start, int32_t size,
                      int32_t latent) {
    int64_t k = to->n++;
    to->request[k] = (int32_t)r;
    to->owners[k] = of->owners[r];
    to->starts[k] = start;
    to->sizes[k] = size;
    to->latents[k] = latent;
    to->rules[k] = of->rules[r];
    to->lasts[k] = of->lasts[r];
    to->mosts[k] = of->mosts[r];
    to->untils[k] = start + 1 + size;
    to->ones[k] = 1;
    to->filtered[k] = of->filtered[r];
    to->reads[2 * k] = start + 1;
    to->reads[2 * k + 1] = latent;
    to->bounds[k] = of->bounds[r];
}

/* Blocks of masks behind a causal row each, whose own byte opens them, into the lines of `drafts` from `line` on. */
static int draft_blocks(const struct task *t, const struct drafts *these, int64_t line) {
    const struct plans *of = t->of;
    int32_t masks[GROUP * of->drafts.width], accepted[GROUP];
    int64_t chosen[GROUP];
    for (int64_t i = 0; i < GROUP * of->drafts.width; i++) masks[i] = (int32_t)of->mask;
    struct plans plans = {
        .count = these->n,
        .owners = these->owners,
        .starts = these->starts,
        .causals = these->ones,
        .selects = these->ones,
        .sizes = these->sizes,
        .latents = these->latents,
        .runs = these->ones,
        .rules = these->rules,
        .lasts = these->lasts,
        .mosts = these->mosts,
        .encoded = these->starts,
        .scanned = these->starts,
        .untils = these->untils,
        .bounds = these->bounds,
        .reads = these->reads,
        .blocks = masks,
        .mask = of->mask,
        .encoder_input = of->encoder_input,
        .chosen = chosen,
        .selected = 1,
        .accepted = accepted,
        .made = lines_from(of->drafts, line),
    };
    struct task task = *t;
    task.of = &plans;
    return block_steps(&task, 0, these->n);
}

/* Drafts of single rows likewise; one that may be whole is scanned and encoded. */
static int draft_rows(const struct task *t, const struct drafts *these, int64_t line) {
    int32_t limits[GROUP], scans[GROUP], opened[GROUP], fresh[GROUP], scanned[GROUP];
    struct made to = lines_from(t->of->drafts, line);
    struct rule rule = {.encoder_input = t->of->encoder_input};
    for (int64_t k = 0; k < these->n; k++) {
        int whole = these->sizes[k] <= these->mosts[k];
        limits[k] = whole ? these->sizes[k] : these->mosts[k];
        scans[k] = whole ? these->sizes[k] + 1 : 0;
        opened[k] = -1;
        fresh[k] = rule.encoder_input != 0;
        scanned[k] = 0;
        to.steps[k] = 0;
        to.bad[k] = 0;
    }
    struct requests requests = {
        .owners = these->owners,
        .starts = these->starts,
        .latents = these->latents,
        .limits = limits,
        .scans = scans,
        .opened = opened,
        .fresh = fresh,
        .made = to.steps,
        .scanned = scanned,
        .ids = to.ids,
        .entropies = to.entropies,
        .bad = to.bad,
        .count = these->n,
        .most = to.width,
    };
    int failed = 0;
    for (int64_t k = 0; k < these->n; k++)
        failed |= single_rows(t->with, &requests, &rule, k, t->threads, &t->room->single, t->spent);
    return failed;
}

/* Whether the text of a request ends with the first `taken` bytes of its selected rows. */
static int has_ended(const struct task *t, int64_t r, int32_t taken) {
    const int64_t *bytes = t->of->chosen + r * t->of->selected;
    for (int32_t i = 0; i < taken; i++)
        if (bytes[i] == t->with->choice->eos) return 1;
    return t->of->made.bad[r];
}

int follow(const struct task *t, int64_t first, int64_t n) {
    const struct plans *of = t->of;
    struct drafts blocks = {.n = 0}, rows = {.n = 0}, filtered = {.n = 0};
    const int32_t *run = of->reads;
    for (int64_t r = 0; r < first; r++) run += 2 * of->runs[r];
    for (int64_t r = first; r < first + n; run += 2 * of->runs[r++]) {
        /* Who has no row that gives a byte drafts from its first position on. */
        int32_t taken = of->selects[r] ? of->accepted[r] + 1 : 0, most = of->lefts[r] - taken - 1;
        int32_t size = of->follows[r] < most ? of->follows[r] : most;
        of->lines[r] = -1;
        if (of->drafts.width) of->drafts.steps[r] = of->drafts.bad[r] = 0;
        if (size <= 0 || has_ended(t, r, taken)) continue;
        int32_t start = end_of(of, r) - of->selects[r] + taken;
        const int32_t *read = run;
        while (of->runs[r] && read[0] < start) read += 2;
        struct drafts *to = of->filtered[r] ? &filtered : of->rules[r] == SINGLE_ROWS ? &rows : &blocks;
        add_draft(to, of, r, start, size, of->runs[r] ? read[1] : of->latents[r]);
    }
    int64_t second = first + blocks.n, third = second + rows.n;
    for (int64_t k = 0; k < blocks.n; k++) of->lines[blocks.request[k]] = (int32_t)(first + k);
    for (int64_t k = 0; k < rows.n; k++) of->lines[rows.request[k]] = (int32_t)(second + k);
    for (int64_t k = 0; k < filtered.n; k++) of->lines[filtered.request[k]] = (int32_t)(third + k);
    int failed = blocks.n ? draft_blocks(t, &blocks, first) : 0;
    if (rows.n) failed |= draft_rows(t, &rows, second);
    return filtered.n ? failed | draft_filtered(t, &filtered, third) : failed;
}
