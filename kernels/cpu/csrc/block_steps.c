/* The steps of a group of requests: a pass of the decoder, the choice of bytes, what they settle, and so on until
 * nothing is masked; then the new bytes through entropy model and encoder. decoder_steps.py says what a step does. */
#include <string.h>

#include "decoder_steps.h"
#include "dense.h"
#include "unmasking.h"

static int64_t *block_of(const struct plans *of, int64_t r) { return of->made.ids + r * of->made.width; }

/* Whether a request's new bytes shall go on through entropy model and encoder, and can. */
static int goes_ahead(const struct plans *of, int64_t r) {
    const int64_t *ids = block_of(of, r);
    for (int64_t i = 0; i < of->sizes[r]; i++)
        if (ids[i] == of->mask) return 0;
    return of->untils[r] > of->scanned[r];
}

/* Encodes the causal rows of requests [first, first + n) that the encoder has not had, if the decoder reads their
 * states. */
static int encode_causal(const struct task *t, int64_t first, int64_t n) {
    const struct plans *of = t->of;
    const struct room *room = t->room;
    struct stretch rows = {.owners = room->owners, .positions = room->positions, .highs = room->highs};
    for (int64_t r = first; r < first + n && of->encoder_input; r++)
        add_stretch(&rows, of->owners[r], of->encoded[r], end_of(of, r));
    return pass_along(t->with->parts, ENCODER, &rows, FRESH_ROWS, t->threads, room->x, NULL, t->spent);
}

/* Encodes the new bytes of requests [first, first + n). */
static int encode_new(const struct task *t, int64_t first, int64_t n) {
    const struct plans *of = t->of;
    const struct room *room = t->room;
    struct stretch rows = {.owners = room->owners, .positions = room->positions, .highs = room->highs};
    for (int64_t r = first; r < first + n; r++) {
        if (!goes_ahead(of, r)) continue;
        int32_t from = of->encoded[r], end = end_of(of, r);
        if (of->encoder_input && from < end) from = end;
        add_stretch(&rows, of->owners[r], from, of->untils[r]);
    }
    return pass_along(t->with->parts, ENCODER, &rows, AHEAD_ROWS, t->threads, room->x, NULL, t->spent);
}

/* Takes the new bytes of requests [first, first + n) through the entropy model. */
static int scan(const struct task *t, int64_t first, int64_t n) {
    const struct plans *of = t->of;
    const struct room *room = t->room;
    struct stretch rows = {.owners = room->owners, .positions = room->positions, .highs = room->highs};
    for (int64_t r = first; r < first + n; r++)
        if (goes_ahead(of, r)) add_stretch(&rows, of->owners[r], of->scanned[r], of->untils[r]);
    int failed =
        pass_along(t->with->parts, PATCHER, &rows, SCANNED_ROWS, t->threads, room->x, room->entropies, t->spent);
    const float *next = room->entropies;
    for (int64_t r = first; r < first + n; r++) {
        int64_t count = goes_ahead(of, r) ? of->untils[r] - of->scanned[r] : 0;
        memcpy(of->made.entropies + r * of->made.longest, next, sizeof(float) * count);
        next += count;
    }
    return failed;
}

/* Requests of a group on their way, and the rows of their next pass. */
struct group {
    int64_t alive[GROUP];  /* those that still have steps */
    int64_t places[GROUP]; /* the first row of the block of each */
    int64_t n, rows;
};

/* A row of the pass: of request r, at `position`, which sees up to `high` of the window that is counted from
 * `first`; `id` is -1 where it is a causal one. */
static void place(const struct task *t, struct group *group, int64_t r, int32_t position, int32_t first, int32_t high,
                  int32_t latent, int64_t id) {
    const struct room *room = t->room;
    int64_t k = group->rows++;
    room->owners[k] = t->of->owners[r];
    room->positions[k] = position;
    room->firsts[k] = first;
    room->highs[k] = high;
    room->latents[k] = latent;
    room->block[k] = (int32_t)id;
}

/* The request has another pass, with the rows of its block. */
static void place_block(const struct task *t, struct group *group, int64_t r) {
    const struct plans *of = t->of;
    int32_t end = end_of(of, r), size = of->sizes[r];
    group->alive[group->n] = r;
    group->places[group->n++] = group->rows;
    for (int32_t i = 0; i < size; i++)
        place(t, group, r, end + i, end, end + size, of->latents[r], block_of(of, r)[i]);
}

/* The rows of requests [first, first + n) in their first pass: causal ones, then the block as it is given. */
static struct group place_first(const struct task *t, int64_t first, int64_t n) {
    const struct plans *of = t->of;
    struct group group = {.n = 0};
    const int32_t *run = of->reads, *block = of->blocks;
    for (int64_t r = 0; r < first; r++) {
        run += 2 * of->runs[r];
        block += of->sizes[r];
    }
    for (int64_t r = first; r < first + n; r++) {
        int32_t p = of->starts[r];
        for (int32_t i = 0; i < of->runs[r]; i++, run += 2)
            for (; p < run[0]; p++) place(t, &group, r, p, p, p + 1, run[1], -1);
        for (int64_t i = 0; i < of->sizes[r]; i++) {
            block_of(of, r)[i] = *block++;
            of->made.fixed[r * of->made.width + i] = 0;
        }
        of->made.bad[r] = 0;
        place_block(t, &group, r);
    }
    return group;
}

/* A pass of the group's rows through the decoder. */
static int decode(const struct task *t, const struct group *group) {
    const struct part *decoder = t->with->parts + DECODER;
    const struct room *room = t->room;
    struct places at = *decoder->at;
    struct source from = *decoder->from;
    struct latents read = *t->with->latents;
    double began = seconds();
    at.rows = room->owners;
    at.positions = room->positions;
    at.firsts = room->firsts;
    at.highs = room->highs;
    read.slots = room->latents;
    from.block = room->block;
    int failed = fastblt_stack(decoder->module, decoder->caches, &at, &read, &from, decoder->to, group->rows,
                               t->threads, room->x);
    t->spent->seconds[DECODER] += seconds() - began;
    return failed;
}

/* Causal rows of a request that give a byte in this step. */
static int64_t selects_of(const struct plans *of, int64_t r, int32_t step) { return step == 1 ? of->selects[r] : 0; }

/* Chooses a byte for the selected causal rows, of which the last one opens the block, and for every masked position. */
static void choose(const struct task *t, const struct group *group, int32_t step) {
    const struct plans *of = t->of;
    const struct room *room = t->room;
    const struct choice *by = t->with->choice;
    int64_t size = t->with->parts[DECODER].module->size, n = 0;
    int counted = 0;
    for (int64_t j = 0; j < group->n; j++) {
        int64_t r = group->alive[j], select = selects_of(of, r, step);
        counted |= of->sizes[r] && of->rules[r] != ONE_STEP && step != of->lasts[r];
        for (int64_t i = -select; i < of->sizes[r]; i++) {
            if (i >= 0 && ((select && !i) || block_of(of, r)[i] != of->mask)) continue;
            room->choosers[n] = of->owners[r];
            room->targets[n] = end_of(of, r) + i + (i < 0);
            room->masks[n] = NULL;
            if (of->allowed && i < 0) room->masks[n] = of->allowed + (r * of->selected + select + i) * by->vocabulary;
            memcpy(room->states + n++ * size, room->x + (group->places[j] + i) * size, sizeof(float) * size);
        }
    }
    linear_map(room->states, n, size, by->head, (struct target){.out = room->logits, .size = by->vocabulary});
    struct choosers rows = {
        .logits = room->logits,
        .owners = room->choosers,
        .positions = room->targets,
        .allowed = of->allowed ? room->masks : NULL,
        .n = n,
    };
    choose_rows(by, &rows, room->ids, counted ? room->confidences : NULL, counted ? room->entropies : NULL, room->bad);
}

/* Where the text of a request goes on behind its causal rows. */
static int64_t *text_of(const struct task *t, int64_t r) {
    return t->with->choice->texts + t->of->owners[r] * t->with->choice->stride + end_of(t->of, r);
}

/* The bytes of a request's selected rows, chosen from `next` on: they go into its text, and the last opens its
 * block. */
static void take_selected(const struct task *t, int64_t r, int64_t next) {
    const struct plans *of = t->of;
    int64_t select = of->selects[r], *text = text_of(t, r) - select + 1;
    int32_t agreed = 0;
    for (int64_t i = 0; i < select; i++) {
        int64_t byte = t->room->ids[next + i];
        of->made.bad[r] |= t->room->bad[next + i];
        agreed += agreed == i && i + 1 < select && text[i] == byte;
        text[i] = of->chosen[r * of->selected + i] = byte;
    }
    of->accepted[r] = agreed;
    if (select && of->sizes[r]) {
        block_of(of, r)[0] = t->room->ids[next + select - 1];
        of->made.fixed[r * of->made.width] = 1;
    }
}

/* Fixes masked positions of a request by its rule, from the bytes that were chosen from *next on, and leaves *next
 * behind them. Returns how many are still masked. */
static int64_t fix_masked(const struct task *t, int64_t r, int32_t step, int64_t *next) {
    const struct plans *of = t->of;
    const struct room *room = t->room;
    int64_t *ids = block_of(of, r), where[of->sizes[r] + 1], masked = 0, still = 0;
    uint8_t picked[of->sizes[r] + 1];
    for (int64_t i = 0; i < of->sizes[r]; i++)
        if (ids[i] == of->mask) where[masked++] = i;
    if (of->rules[r] == ONE_STEP || step == of->lasts[r])
        memset(picked, 1, masked);
    else if (masked)
        fastblt_pick(of->rules[r], of->bounds[r], room->confidences + *next, room->entropies + *next, masked, picked);
    for (int64_t k = 0; k < masked; k++, (*next)++) {
        of->made.bad[r] |= room->bad[*next];
        if (picked[k]) {
            ids[where[k]] = room->ids[*next];
            of->made.fixed[r * of->made.width + where[k]] = step;
        } else {
            still++;
        }
    }
    return still;
}

/* What becomes of the bytes of a step; returns the requests that have another, whose pass has their blocks' rows
 * alone. */
static struct group settle(const struct task *t, const struct group *group, int32_t step) {
    const struct plans *of = t->of;
    struct group left = {.n = 0};
    int64_t next = 0;
    for (int64_t j = 0; j < group->n; j++) {
        int64_t r = group->alive[j];
        if (step == 1) {
            take_selected(t, r, next);
            next += of->selects[r];
        }
        int64_t still = fix_masked(t, r, step, &next);
        of->made.steps[r] = step;
        if (still && step < of->mosts[r])
            place_block(t, &left, r);
        else if (of->sizes[r])
            memcpy(text_of(t, r), block_of(of, r), sizeof(int64_t) * of->sizes[r]);
    }
    return left;
}

int block_steps(const struct task *t, int64_t first, int64_t n) {
    double began = seconds();
    int failed = encode_causal(t, first, n);
    struct group group = place_first(t, first, n);
    for (int32_t step = 1; group.n; step++) {
        /* A request that only drafts has no row here. */
        if (group.rows) {
            failed |= decode(t, &group);
            choose(t, &group, step);
        }
        group = settle(t, &group, step);
    }
    failed |= scan(t, first, n);
    failed |= encode_new(t, first, n);
    t->spent->seconds[MODULES] += seconds() - began;
    return failed;
}
