/* A pass of the decoder and the choice of bytes from it, all further passes that fill blocks, and the drafts behind
 * verifications, in one call, on a CPU, fp32. What a step does stands in decoder_steps.py.
 *
 * Threads share the requests in groups, and a group makes all of its steps before the next begins; a group that is alone
 * shares out the rows of each pass. Every row is computed as if it were alone, so neither changes a result.
 */
#include "choice.h"
#include "stack.c"
#include "part.h"
#include "single_rows.h"

/* Requests that a thread takes through their passes together: few enough for nobody to wait long for another's. */
#define GROUP 4

/* As in unmasking.py. */
enum { SINGLE_ROWS = -1, BY_CONFIDENCE, BY_ENTROPY, EXCLUSIVE_MAX, ONE_STEP };

/* What became of blocks, a line for each: ids [.., width], the steps that fixed them, how many there were, whether a row
 * had no finite choice, and the entropies of what was scanned [.., longest]. */
struct made {
    int64_t *ids;
    int32_t *fixed, *steps;
    uint8_t *bad;
    float *entropies;
    int64_t width, longest;
};

/* By request: its state row; where its causal rows start, how many there are, and how many of the last give a byte; its
 * block's size; the latent that the block reads, and how many cuts its causal rows have; rule and bound; the step that
 * fills what is left, 0 where none does; most steps; up to where its text has been encoded and scanned, and shall be; how
 * long a draft behind it may be, a block or single rows by its rule, and how many bytes its text may still get. One
 * behind another: the cuts (position before which rows read a latent, and its slot), and the ids of blocks.
 * Of what became of it: the causal rows' bytes [count, most selected]; how many of the bytes that stood in their place
 * they agree with; the line in `next` of the draft behind it, -1 where none was made; the rest in `made`. `fed`: causal
 * rows begin as encoder states. */
struct plans {
    const int32_t *owners, *starts, *causals, *selects, *sizes, *latents, *cuts, *rules, *lasts, *mosts, *encoded, *scanned,
        *untils, *follows, *lefts;
    const float *bounds;
    const int32_t *reads, *blocks;
    int64_t *chosen;
    int32_t *accepted, *lines;
    struct made made, next;
    int64_t count, selected, mask, fed;
};

/* The same as it comes: one behind another what is asked for, the columns first, then the cuts, then the blocks' ids; and
 * room for what becomes of it, in the order of `laid_out`. A draft is at most `behind` bytes long. */
struct call {
    const int32_t *asked;
    const float *bounds;
    int64_t *ids;
    int32_t *numbers;
    float *entropies;
    int64_t count, cuts, selected, width, longest, behind, mask, fed;
};

static struct plans laid_out(const struct call *of) {
    int64_t n = of->count, lines = of->behind ? n : 0, width = of->behind ? of->behind + 1 : 0;
    const int32_t *asked = of->asked, *reads = asked + 15 * n;
    int64_t *ids = of->ids + n * of->selected;
    int32_t *steps = of->numbers + 2 * n, *fixed = steps + n, *then = fixed + n * of->width, *end = then + lines * (1 + width);
    uint8_t *bad = (uint8_t *)end;
    struct made made = {ids, fixed, steps, bad, of->entropies, of->width, of->longest};
    struct made next = {
        ids + n * of->width, then + lines, then, bad + n, of->entropies + n * of->longest, width, width};
    return (struct plans){
        asked, asked + n, asked + 2 * n, asked + 3 * n, asked + 4 * n, asked + 5 * n, asked + 6 * n, asked + 7 * n,
        asked + 8 * n, asked + 9 * n, asked + 10 * n, asked + 11 * n, asked + 12 * n, asked + 13 * n, asked + 14 * n,
        of->bounds, reads, reads + 2 * of->cuts, of->ids, of->numbers, of->numbers + n, made, next, n, of->selected,
        of->mask, of->fed};
}

/* Room for so many rows of a group; `scratch` is that of single rows, `each` what one takes of it before their logits. */
struct room {
    int32_t *owners, *positions, *firsts, *highs, *latents, *block, *choosers;
    int64_t *targets, *ids;
    float *x, *chosen_from, *logits, *confidences, *entropies, *scratch;
    uint8_t *bad;
    int64_t rows, each;
};

/* Which of `count` masked positions a step fixes, by the rules of unmasking.py: NaN of a bad row comes last. */
void fastblt_pick(int32_t rule, float bound, const float *confidences, const float *entropies, int64_t count,
                  uint8_t *picked) {
    if (rule == BY_CONFIDENCE) {
        int64_t best = 0;
        float most = -1.0f;
        for (int64_t i = 0; i < count; i++) {
            float value = confidences[i] == confidences[i] ? confidences[i] : 0.0f;
            picked[i] = value > bound;
            if (value > most) most = value, best = i;
        }
        picked[best] = 1;
        return;
    }
    double total = 0.0, before = 0.0;
    memset(picked, 0, count);
    uint8_t seen[count];
    memset(seen, 0, count);
    for (int64_t k = 0; k < count; k++) {
        int64_t next = -1;
        float least = 0.0f;
        for (int64_t i = 0; i < count; i++) {
            float value = entropies[i] == entropies[i] ? entropies[i] : 3.402823466e+38f;
            if (!seen[i] && (next < 0 || value < least)) least = value, next = i;
        }
        seen[next] = 1;
        before = total, total += least;
        picked[next] = !k || (rule == EXCLUSIVE_MAX ? before : total) <= bound;
    }
}

/* Whether a request's new bytes shall go on through entropy model and encoder, and can. */
static int goes_ahead(const struct plans *of, int64_t r) {
    for (int64_t i = 0; i < of->sizes[r]; i++)
        if (of->made.ids[r * of->made.width + i] == of->mask) return 0;
    return of->untils[r] > of->scanned[r];
}

/* Rows of requests [first, first + n) that the encoder has not had: causal ones of which the decoder will read the states,
 * or, `ahead`, those of new bytes. */
static int encode(const struct part *parts, const struct plans *of, int64_t first, int64_t n, int ahead, int64_t threads,
                  const struct room *room, struct spent *spent) {
    struct stretch rows = {room->owners, room->positions, room->highs, 0};
    for (int64_t r = first; r < first + n; r++) {
        int32_t end = of->starts[r] + of->causals[r], from = of->encoded[r];
        if (!ahead) stretch_to(&rows, of->owners[r], from, of->fed ? end : from);
        else if (goes_ahead(of, r)) stretch_to(&rows, of->owners[r], of->fed && from < end ? end : from, of->untils[r]);
    }
    return pass_along(parts, ENCODER, &rows, ahead ? AHEAD : FRESH, threads, room->x, NULL, spent);
}

/* Their new bytes through the entropy model. */
static int scan(const struct part *parts, const struct plans *of, int64_t first, int64_t n, int64_t threads,
                const struct room *room, struct spent *spent) {
    struct stretch rows = {room->owners, room->positions, room->highs, 0};
    for (int64_t r = first; r < first + n; r++)
        if (goes_ahead(of, r)) stretch_to(&rows, of->owners[r], of->scanned[r], of->untils[r]);
    int failed = pass_along(parts, PATCHER, &rows, SCANNED, threads, room->x, room->entropies, spent);
    const float *next = room->entropies;
    for (int64_t r = first; r < first + n; r++) {
        int64_t count = goes_ahead(of, r) ? of->untils[r] - of->scanned[r] : 0;
        memcpy(of->made.entropies + r * of->made.longest, next, sizeof(float) * count);
        next += count;
    }
    return failed;
}

/* Row k: of request r, at `position`, which sees [.., high) of its window behind `first`; `id` is -1 where it is known. */
static void place(const struct room *room, int64_t k, const struct plans *of, int64_t r, int32_t position, int32_t first,
                  int32_t high, int32_t latent, int64_t id) {
    room->owners[k] = of->owners[r], room->positions[k] = position, room->firsts[k] = first, room->highs[k] = high;
    room->latents[k] = latent, room->block[k] = (int32_t)id;
}

/* The block's rows from row k on; returns the row behind them. */
static int64_t place_block(const struct room *room, int64_t k, const struct plans *of, int64_t r) {
    int32_t end = of->starts[r] + of->causals[r], size = of->sizes[r];
    for (int32_t i = 0; i < size; i++)
        place(room, k++, of, r, end + i, end, end + size, of->latents[r], of->made.ids[r * of->made.width + i]);
    return k;
}

/* Requests [first, first + n) to the end of their steps. Returns 0, or 1 when memory ran out. */
static int steps(const struct part *parts, const struct plans *of, const struct latents *latents, const struct choice *by,
                 int64_t first, int64_t n, int64_t threads, const struct room *room, struct spent *spent) {
    const struct part *decoder = parts + DECODER;
    int64_t size = decoder->module->size, count = 0, alive[GROUP], places[GROUP], all = n;
    struct places at = *decoder->at;
    struct source from = *decoder->from;
    struct latents read = *latents;
    double started = now();
    int failed = encode(parts, of, first, n, 0, threads, room, spent);
    at.rows = room->owners, at.positions = room->positions, at.firsts = room->firsts, at.highs = room->highs;
    read.slots = room->latents, from.block = room->block;
    const int32_t *cut = of->reads, *block = of->blocks;
    for (int64_t r = 0; r < first; r++) cut += 2 * of->cuts[r], block += of->sizes[r];
    for (int64_t j = 0; j < n; j++) {
        int64_t r = first + j;
        int32_t p = of->starts[r];
        for (int32_t i = 0; i < of->cuts[r]; i++, cut += 2)
            for (; p < cut[0]; p++) place(room, count++, of, r, p, p, p + 1, cut[1], -1);
        for (int64_t i = 0; i < of->sizes[r]; i++) {
            of->made.ids[r * of->made.width + i] = *block++;
            of->made.fixed[r * of->made.width + i] = 0;
        }
        of->made.bad[r] = 0;
        alive[j] = r, places[j] = count, count = place_block(room, count, of, r);
    }
    for (int32_t step = 1; n; step++) {
        double began = now();
        failed |= fastblt_stack(decoder->module, decoder->caches, &at, &read, &from, decoder->to, count, threads, room->x);
        spent->seconds[DECODER] += now() - began;
        /* What gives a byte: causal rows in the first step, of which the last one opens a block, and what is masked. */
        int64_t chosen = 0;
        int counted = 0;
        for (int64_t j = 0; j < n; j++) {
            int64_t r = alive[j], select = step == 1 ? of->selects[r] : 0;
            int32_t end = of->starts[r] + of->causals[r];
            counted |= of->sizes[r] && of->rules[r] != ONE_STEP && step != of->lasts[r];
            for (int64_t i = -select; i < of->sizes[r]; i++) {
                if (i >= 0 && ((select && !i) || of->made.ids[r * of->made.width + i] != of->mask)) continue;
                room->choosers[chosen] = of->owners[r];
                room->targets[chosen] = end + i + (i < 0);
                memcpy(room->chosen_from + chosen++ * size, room->x + (places[j] + i) * size, sizeof(float) * size);
            }
        }
        map(room->chosen_from, chosen, size, by->head, (struct target){room->logits, NULL, by->vocabulary, 0});
        choose_rows(by, room->logits, room->choosers, room->targets, chosen, room->ids, counted ? room->confidences : NULL,
                    counted ? room->entropies : NULL, room->bad);
        int64_t left = 0, next = 0;
        count = 0;
        for (int64_t j = 0; j < n; j++) {
            int64_t r = alive[j], masked = 0, select = step == 1 ? of->selects[r] : 0;
            int64_t *ids = of->made.ids + r * of->made.width, where[of->sizes[r] + 1], still = 0;
            int64_t *text = by->texts + of->owners[r] * by->stride + of->starts[r] + of->causals[r];
            int32_t *fixed = of->made.fixed + r * of->made.width;
            uint8_t picked[of->sizes[r] + 1];
            int32_t agreed = 0;
            for (int64_t i = 0; i < select; i++, next++) {
                int64_t *place = text + i - select + 1, byte = room->ids[next];
                of->made.bad[r] |= room->bad[next];
                agreed += agreed == i && i + 1 < select && *place == byte;
                *place = of->chosen[r * of->selected + i] = byte;
            }
            if (step == 1) of->accepted[r] = agreed;
            if (select && of->sizes[r]) ids[0] = room->ids[next - 1], fixed[0] = step;
            for (int64_t i = 0; i < of->sizes[r]; i++)
                if (ids[i] == of->mask) where[masked++] = i;
            if (of->rules[r] == ONE_STEP || step == of->lasts[r]) memset(picked, 1, masked);
            else if (masked)
                fastblt_pick(of->rules[r], of->bounds[r], room->confidences + next, room->entropies + next, masked,
                             picked);
            for (int64_t k = 0; k < masked; k++, next++) {
                of->made.bad[r] |= room->bad[next];
                if (picked[k]) ids[where[k]] = room->ids[next], fixed[where[k]] = step;
                else still++;
            }
            of->made.steps[r] = step;
            if (still && step < of->mosts[r]) {
                /* The next pass has the block's rows alone. */
                places[left] = count, alive[left++] = r, count = place_block(room, count, of, r);
            } else if (of->sizes[r]) {
                memcpy(text, ids, sizeof(int64_t) * of->sizes[r]);
            }
        }
        n = left;
    }
    failed |= scan(parts, of, first, all, threads, room, spent);
    failed |= encode(parts, of, first, all, 1, threads, room, spent);
    spent->seconds[MODULES] += now() - started;
    return failed;
}

/* Drafts of a group behind verifications: blocks, or single rows. */
struct drafts {
    int32_t owners[GROUP], starts[GROUP], sizes[GROUP], latents[GROUP], rules[GROUP], lasts[GROUP], mosts[GROUP],
        untils[GROUP], ones[GROUP], reads[2 * GROUP], request[GROUP];
    float bounds[GROUP];
    int64_t n;
};

static void add_draft(struct drafts *to, const struct plans *of, int64_t r, int32_t start, int32_t size, int32_t latent) {
    int64_t k = to->n++;
    to->request[k] = (int32_t)r, to->owners[k] = of->owners[r], to->starts[k] = start, to->sizes[k] = size;
    to->latents[k] = to->reads[2 * k + 1] = latent, to->reads[2 * k] = start + 1, to->ones[k] = 1;
    to->rules[k] = of->rules[r], to->bounds[k] = of->bounds[r], to->lasts[k] = of->lasts[r], to->mosts[k] = of->mosts[r];
    to->untils[k] = start + 1 + size;
}

/* Blocks of masks behind a causal row each, whose own byte opens them, into the lines of `next` from `line` on. */
static int draft_blocks(const struct part *parts, const struct plans *of, const struct drafts *these,
                        const struct latents *latents, const struct choice *by, int64_t line, int64_t threads,
                        const struct room *room, struct spent *spent) {
    struct made to = of->next;
    int32_t masks[GROUP * to.width], accepted[GROUP];
    int64_t chosen[GROUP];
    for (int64_t i = 0; i < GROUP * to.width; i++) masks[i] = (int32_t)of->mask;
    to.ids += line * to.width, to.fixed += line * to.width, to.entropies += line * to.longest;
    to.steps += line, to.bad += line;
    struct plans plans = {
        these->owners, these->starts, these->ones, these->ones, these->sizes, these->latents, these->ones, these->rules,
        these->lasts, these->mosts, these->starts, these->starts, these->untils, NULL, NULL, these->bounds, these->reads,
        masks, chosen, accepted, NULL, to, to, these->n, 1, of->mask, of->fed};
    return steps(parts, &plans, latents, by, 0, these->n, threads, room, spent);
}

/* Single rows likewise: a draft that may be whole is scanned and encoded. */
static int draft_rows(const struct part *parts, const struct plans *of, const struct drafts *these,
                      const struct latents *latents, const struct choice *by, int64_t line, int64_t threads,
                      const struct room *room, struct spent *spent) {
    int32_t limits[GROUP], scans[GROUP], opened[GROUP], fresh[GROUP], scanned[GROUP];
    struct made to = of->next;
    struct rule rule = {0, 0, of->fed};
    struct stretch beside = {room->owners, room->positions, room->highs, room->rows};
    for (int64_t k = 0; k < these->n; k++) {
        int whole = these->sizes[k] <= these->mosts[k];
        limits[k] = whole ? these->sizes[k] : these->mosts[k], scans[k] = whole ? these->sizes[k] + 1 : 0;
        opened[k] = -1, fresh[k] = of->fed != 0, scanned[k] = 0, to.steps[line + k] = to.bad[line + k] = 0;
    }
    struct requests requests = {
        these->owners, these->starts, these->latents, limits, scans, opened, fresh, to.steps + line, scanned,
        to.ids + line * to.width, to.entropies + line * to.width, to.bad + line, these->n, to.width};
    int failed = 0;
    for (int64_t k = 0; k < these->n; k++)
        failed |= single_rows(parts, &requests, latents, by, &rule, k, room->scratch, room->x, room->scratch + room->each,
                              threads, &beside, spent);
    return failed;
}

/* The drafts behind verifications of requests [first, first + n): over the byte behind what was accepted, on the latent
 * that the last accepted row read. Their lines in `next` begin at `first`. */
static int follow(const struct part *parts, const struct plans *of, const struct latents *latents, const struct choice *by,
                  int64_t first, int64_t n, int64_t threads, const struct room *room, struct spent *spent) {
    struct drafts blocks = {.n = 0}, rows = {.n = 0};
    const int32_t *cut = of->reads;
    for (int64_t r = 0; r < first; r++) cut += 2 * of->cuts[r];
    for (int64_t r = first; r < first + n; cut += 2 * of->cuts[r++]) {
        const int64_t *bytes = of->chosen + r * of->selected;
        int32_t taken = of->accepted[r] + 1, most = of->lefts[r] - taken - 1;
        int32_t size = of->follows[r] < most ? of->follows[r] : most, ended = size <= 0 || of->made.bad[r];
        of->lines[r] = -1;
        if (of->next.width) of->next.steps[r] = of->next.bad[r] = 0;
        for (int32_t i = 0; i < taken && !ended; i++) ended = bytes[i] == by->eos;
        if (ended) continue;
        int32_t start = of->starts[r] + of->causals[r] - of->selects[r] + taken;
        const int32_t *read = cut;
        while (read[0] < start) read += 2;
        add_draft(of->rules[r] == SINGLE_ROWS ? &rows : &blocks, of, r, start, size, read[1]);
    }
    for (int64_t k = 0; k < blocks.n; k++) of->lines[blocks.request[k]] = (int32_t)(first + k);
    for (int64_t k = 0; k < rows.n; k++) of->lines[rows.request[k]] = (int32_t)(first + blocks.n + k);
    int failed = blocks.n && draft_blocks(parts, of, &blocks, latents, by, first, threads, room, spent);
    return failed | (rows.n && draft_rows(parts, of, &rows, latents, by, first + blocks.n, threads, room, spent));
}

/* Makes the steps of all plans; what is `spent` becomes that of a thread. Returns 0, or 1 when memory ran out. */
int fastblt_decoder_steps(const struct part *parts, const struct call *call, const struct latents *latents,
                          const struct choice *by, int64_t threads, struct spent *spent) {
    struct plans plans = laid_out(call);
    const struct plans *of = &plans;
    int64_t most = 0, size = 0, groups = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < of->count ? threads : of->count;
    int32_t *starts = malloc(sizeof(int32_t) * (of->count + 1));
    if (!starts) return 1;
    /* The last groups are small, so that no thread waits long for another's. */
    for (int64_t at = 0, left; starts[groups] = (int32_t)at, left = of->count - at; groups++) {
        int64_t each = (left + 2 * apart - 1) / (2 * apart);
        at += each < GROUP ? each : GROUP;
    }
    for (int64_t i = 0; i < MODULES; i++) size = parts[i].module->size > size ? parts[i].module->size : size;
    for (int64_t g = 0; g < groups; g++) {
        int64_t rows = 0, beside = 0, behind = 0;
        for (int64_t r = starts[g]; r < starts[g + 1]; r++) {
            int32_t from = of->scanned[r] < of->encoded[r] ? of->scanned[r] : of->encoded[r];
            int32_t end = of->starts[r] + of->causals[r], until = of->untils[r] > end ? of->untils[r] : end;
            rows += of->causals[r] + of->sizes[r];
            beside += until > from ? until - from : 0;
            behind += of->follows[r] ? 1 + of->follows[r] : 0;
        }
        rows = beside > rows ? beside : rows;
        rows = behind > rows ? behind : rows;
        most = rows > most ? rows : most;
    }
    int64_t each = sizeof(float) * (2 * size + by->vocabulary + 2) + 7 * sizeof(int32_t) + 2 * sizeof(int64_t) + 1;
    int64_t each_step, stepping = step_floats(parts, by->vocabulary, &each_step);
    int64_t share = (most * each + stepping * sizeof(float) + 7) / 8 * 8;
    char *memory = malloc(apart * share);
    if (!memory) {
        free(starts);
        return 1;
    }
    struct spent all = {0};
    int failed = 0;
#pragma omp parallel for num_threads(apart) schedule(dynamic, 1) if (groups > 1) reduction(| : failed) reduction(add : all)
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = starts[g], n = starts[g + 1] - first;
        /* Widest first, so that all are aligned. */
        int64_t *longs = (int64_t *)(memory + omp_get_thread_num() * share);
        float *floats = (float *)(longs + 2 * most), *scratch = floats + most * (2 * size + by->vocabulary + 2);
        int32_t *ints = (int32_t *)(scratch + stepping);
        struct room room = {
            ints, ints + most, ints + 2 * most, ints + 3 * most, ints + 4 * most, ints + 5 * most, ints + 6 * most,
            longs, longs + most, floats, floats + most * size, floats + 2 * most * size,
            floats + most * (2 * size + by->vocabulary), floats + most * (2 * size + by->vocabulary + 1),
            scratch, (uint8_t *)(ints + 7 * most), most, each_step};
        int64_t each_pass = groups > 1 ? 1 : threads;
        failed |= steps(parts, of, latents, by, first, n, each_pass, &room, &all);
        failed |= follow(parts, of, latents, by, first, n, each_pass, &room, &all);
    }
    for (int64_t i = 0; i <= MODULES; i++) all.seconds[i] /= groups > 1 ? apart : 1;
    *spent = all;
    free(memory), free(starts);
    return failed;
}
