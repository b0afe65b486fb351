/* Filtered drafts (BLT-DSV): a block proposes bytes, causal rows of the decoder over them keep those that they would have
 * drafted and correct the first other one, and so on to the end of the draft. */
#include <string.h>

#include "drafts.h"

/* Missing bytes up to which single rows take as few passes as a block and its filter; as in server/decoding/blt_dsv.py. */
#define FEW 2

/* Drafts of a group on their way. */
struct filtering {
    const struct task *t;
    const struct drafts *of;
    struct made to;
    int32_t done[GROUP]; /* how many bytes each has */
};

/* An inner round of some of them: the drafts that take part, and what block_steps takes of each. */
struct inner {
    int64_t n;
    int64_t who[GROUP];
    int32_t owners[GROUP], starts[GROUP], behind[GROUP], sizes[GROUP], latents[GROUP], rules[GROUP], lasts[GROUP];
    int32_t ones[GROUP], nothing[GROUP], accepted[GROUP], steps[GROUP];
    int32_t reads[2 * GROUP];
    float bounds[GROUP];
    uint8_t bad[GROUP];
};

/* The drafts that miss more bytes than single rows should make. */
static struct inner next_inner(const struct filtering *f) {
    const struct drafts *of = f->of;
    struct inner in = {.n = 0};
    for (int64_t k = 0; k < of->n; k++) {
        int32_t missing = of->sizes[k] - f->done[k];
        if (f->to.bad[k] || missing <= FEW) continue;
        int64_t i = in.n++;
        in.who[i] = k;
        in.owners[i] = of->owners[k];
        in.starts[i] = of->starts[k] + f->done[k];
        in.behind[i] = in.starts[i] + 1;
        /* The filter gives a byte behind the block's last one. */
        in.sizes[i] = of->filtered[k] < missing - 1 ? of->filtered[k] : missing - 1;
        in.latents[i] = of->latents[k];
        in.rules[i] = of->rules[k];
        in.lasts[i] = of->lasts[k];
        in.bounds[i] = of->bounds[k];
        in.ones[i] = 1;
    }
    return in;
}

/* All steps of the blocks behind the pending bytes. */
static int fill_blocks(const struct filtering *f, struct inner *in, int64_t *ids, int64_t width) {
    const struct plans *call = f->t->of;
    int32_t masks[GROUP * width], fixed[GROUP * width];
    int64_t chosen[GROUP];
    float entropies;
    for (int64_t i = 0; i < GROUP * width; i++) masks[i] = (int32_t)call->mask;
    for (int64_t i = 0; i < in->n; i++) {
        in->reads[2 * i] = in->behind[i];
        in->reads[2 * i + 1] = in->latents[i];
    }
    struct plans plans = {
        .count = in->n,
        .owners = in->owners,
        .starts = in->starts,
        .causals = in->ones,
        .selects = in->ones,
        .sizes = in->sizes,
        .latents = in->latents,
        .runs = in->ones,
        .rules = in->rules,
        .lasts = in->lasts,
        .mosts = in->sizes,
        .encoded = in->starts,
        .scanned = in->nothing,
        .untils = in->nothing,
        .bounds = in->bounds,
        .reads = in->reads,
        .blocks = masks,
        .mask = call->mask,
        .encoder_input = call->encoder_input,
        .chosen = chosen,
        .selected = 1,
        .accepted = in->accepted,
        .made =
            {
                .ids = ids,
                .fixed = fixed,
                .steps = in->steps,
                .bad = in->bad,
                .entropies = &entropies,
                .width = width,
            },
    };
    struct task task = *f->t;
    task.of = &plans;
    return block_steps(&task, 0, in->n);
}

/* Causal rows over the blocks' bytes: what the decoder itself would have drafted behind each, in `chosen`. */
static int filter_blocks(const struct filtering *f, struct inner *in, int64_t *chosen, int64_t width) {
    const struct plans *call = f->t->of;
    int32_t steps[GROUP];
    uint8_t bad[GROUP];
    int64_t none;
    float entropies;
    for (int64_t i = 0; i < in->n; i++) in->reads[2 * i] = in->behind[i] + in->sizes[i];
    struct plans plans = {
        .count = in->n,
        .owners = in->owners,
        .starts = in->behind,
        .causals = in->sizes,
        .selects = in->sizes,
        .sizes = in->nothing,
        .latents = in->latents,
        .runs = in->ones,
        .rules = in->rules,
        .lasts = in->lasts,
        .mosts = in->ones,
        .encoded = in->behind,
        .scanned = in->nothing,
        .untils = in->nothing,
        .bounds = in->bounds,
        .reads = in->reads,
        .mask = call->mask,
        .encoder_input = call->encoder_input,
        .chosen = chosen,
        .selected = width,
        .accepted = in->accepted,
        .made = {.ids = &none, .steps = steps, .bad = bad, .entropies = &entropies},
    };
    struct task task = *f->t;
    task.of = &plans;
    int failed = block_steps(&task, 0, in->n);
    for (int64_t i = 0; i < in->n; i++) in->bad[i] |= bad[i];
    return failed;
}

/* What an inner round gave: the block's first byte, those that the filter agrees with, and its own byte behind them. */
static void keep(struct filtering *f, const struct inner *in, const int64_t *blocks, const int64_t *chosen, int64_t width) {
    for (int64_t i = 0; i < in->n; i++) {
        int64_t k = in->who[i], at = k * f->to.width + f->done[k];
        int32_t passed = in->accepted[i];
        f->to.ids[at] = blocks[i * width];
        f->to.fixed[at] = ALONE;
        for (int32_t j = 0; j <= passed; j++) {
            f->to.ids[at + 1 + j] = chosen[i * width + j];
            f->to.fixed[at + 1 + j] = j < passed ? PASSED : CORRECTED;
        }
        f->done[k] += 2 + passed;
        f->to.steps[k] += in->steps[i] + 1;
        f->to.bad[k] |= in->bad[i];
    }
}

/* The last bytes of draft k as single rows. */
static int finish_alone(struct filtering *f, int64_t k) {
    const struct task *t = f->t;
    int32_t start = f->of->starts[k] + f->done[k], limit = f->of->sizes[k] - f->done[k], scans = f->of->sizes[k] + 1;
    int32_t made = 0, scanned = 0, opened = -1, fresh = t->of->encoder_input != 0;
    int64_t at = k * f->to.width + f->done[k];
    struct rule rule = {.encoder_input = t->of->encoder_input};
    struct requests one = {
        .owners = f->of->owners + k,
        .starts = &start,
        .latents = f->of->latents + k,
        .limits = &limit,
        .scans = &scans,
        .opened = &opened,
        .fresh = &fresh,
        .made = &made,
        .scanned = &scanned,
        .ids = f->to.ids + at,
        .entropies = f->to.entropies + k * f->to.longest,
        .bad = f->to.bad + k,
        .count = 1,
        .most = f->to.width,
    };
    int failed = single_rows(t->with, &one, &rule, 0, t->threads, &t->room->single, t->spent);
    for (int32_t j = 0; j < made; j++) f->to.fixed[at + j] = ALONE;
    f->to.steps[k] += made;
    return failed;
}

/* A draft that ended with a filter goes through the entropy model, and its last byte through the encoder where drafted rows
 * begin as encoder states. */
static int go_ahead(const struct filtering *f, int64_t k) {
    const struct task *t = f->t;
    const struct room *room = t->room;
    struct stretch rows = {.owners = room->owners, .positions = room->positions, .highs = room->highs};
    int32_t owner = f->of->owners[k], start = f->of->starts[k], count = f->of->sizes[k] + 1;
    add_stretch(&rows, owner, start, start + count);
    int failed =
        pass_along(t->with->parts, PATCHER, &rows, SCANNED_ROWS, t->threads, room->x, room->entropies, t->spent);
    memcpy(f->to.entropies + k * f->to.longest, room->entropies, sizeof(float) * count);
    rows.n = 0;
    if (t->of->encoder_input) add_stretch(&rows, owner, start + count - 1, start + count);
    return failed | pass_along(t->with->parts, ENCODER, &rows, AHEAD_ROWS, t->threads, room->x, NULL, t->spent);
}

int draft_filtered(const struct task *t, const struct drafts *these, int64_t line) {
    struct filtering f = {.t = t, .of = these, .to = lines_from(t->of->drafts, line)};
    int64_t width = f.to.width, blocks[GROUP * width], chosen[GROUP * width];
    int failed = 0;
    for (int64_t k = 0; k < these->n; k++) f.to.steps[k] = f.to.bad[k] = 0;
    for (;;) {
        struct inner in = next_inner(&f);
        if (!in.n || failed) break;
        failed |= fill_blocks(&f, &in, blocks, width);
        failed |= filter_blocks(&f, &in, chosen, width);
        keep(&f, &in, blocks, chosen, width);
    }
    for (int64_t k = 0; k < these->n && !failed; k++) {
        if (f.to.bad[k]) continue;
        failed |= f.done[k] < these->sizes[k] ? finish_alone(&f, k) : go_ahead(&f, k);
    }
    return failed;
}
