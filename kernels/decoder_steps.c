/* A pass of the decoder and the choice of bytes from it, and all further passes that fill blocks, in one call, on a CPU,
 * fp32. What a step does stands in decoder_steps.py.
 *
 * Threads share the requests in groups, and a group makes all of its steps before the next begins; a group that is alone
 * shares out the rows of each pass. Every row is computed as if it were alone, so neither changes a result.
 */
#include "choice.h"
#include "stack.c"
#include "part.h"

/* Requests of a group: few, so that there are groups for every thread and nobody waits long for another's step. */
#define GROUP 4

/* As in unmasking.py. */
enum { BY_CONFIDENCE, BY_ENTROPY, EXCLUSIVE_MAX, ONE_STEP };

/* The rows of the first passes, those of a request together and its block's last. */
struct rows {
    const int32_t *owners, *positions, *firsts, *highs, *latents, *block;
};

/* By request: the row behind its causal ones, and how many of these give a byte; its block's size; rule and bound; the
 * step that fills what is left, 0 where none does; most steps. Of what became of it: the causal rows' bytes [count, most
 * selected], the block's ids [count, width], the steps that fixed them, how many there were, and whether a row had no
 * finite choice. */
struct plans {
    const int32_t *ends, *selects, *sizes, *rules, *lasts, *mosts;
    const float *bounds;
    int64_t *chosen, *ids;
    int32_t *fixed, *steps;
    uint8_t *bad;
    int64_t count, selected, width, mask;
};

/* Room for the rows of a group. */
struct room {
    int32_t *owners, *positions, *firsts, *highs, *latents, *block;
    int64_t *targets, *ids;
    float *x, *chosen_from, *logits, *confidences, *entropies;
    uint8_t *bad;
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

/* Requests [first, first + n) to the end of their steps. Returns 0, or 1 when memory ran out. */
static int steps(const struct part *decoder, const struct rows *given, const struct plans *of,
                 const struct latents *latents, const struct choice *by, int64_t first, int64_t n, int64_t threads,
                 const struct room *room, double *seconds) {
    int64_t size = decoder->module->size, count = 0, alive[GROUP], places[GROUP];
    int64_t begin = first ? of->ends[first - 1] + of->sizes[first - 1] : 0;
    struct places at = *decoder->at;
    struct source from = *decoder->from;
    struct latents read = *latents;
    int failed = 0;
    at.rows = given->owners + begin, at.positions = given->positions + begin, at.firsts = given->firsts + begin;
    at.highs = given->highs + begin, read.slots = given->latents + begin, from.block = given->block + begin;
    for (int64_t j = 0; j < n; j++) {
        int64_t r = first + j;
        alive[j] = r, places[j] = of->ends[r] - begin;
        count = places[j] + of->sizes[r];
        for (int64_t i = 0; i < of->sizes[r]; i++) {
            of->ids[r * of->width + i] = given->block[of->ends[r] + i];
            of->fixed[r * of->width + i] = 0;
        }
    }
    for (int32_t step = 1; n; step++) {
        double began = now();
        failed |= fastblt_stack(decoder->module, decoder->caches, &at, &read, &from, decoder->to, count, threads, room->x);
        seconds[0] += now() - began;
        /* What gives a byte: causal rows in the first step, of which the last one opens a block, and what is masked. */
        int64_t chosen = 0;
        int counted = 0;
        for (int64_t j = 0; j < n; j++) {
            int64_t r = alive[j], row = of->ends[r], select = step == 1 ? of->selects[r] : 0;
            counted |= of->sizes[r] && of->rules[r] != ONE_STEP && step != of->lasts[r];
            for (int64_t i = -select; i < of->sizes[r]; i++) {
                if (i >= 0 && ((select && !i) || of->ids[r * of->width + i] != of->mask)) continue;
                room->owners[chosen] = given->owners[row + i];
                room->targets[chosen] = given->positions[row + i] + (i < 0);
                memcpy(room->chosen_from + chosen++ * size, room->x + (places[j] + i) * size, sizeof(float) * size);
            }
        }
        map(room->chosen_from, chosen, size, by->head, (struct target){room->logits, NULL, by->vocabulary, 0});
        choose_rows(by, room->logits, room->owners, room->targets, chosen, room->ids, counted ? room->confidences : NULL,
               counted ? room->entropies : NULL, room->bad);
        int64_t left = 0, rows = 0, next = 0;
        for (int64_t j = 0; j < n; j++) {
            int64_t r = alive[j], row = of->ends[r], masked = 0, select = step == 1 ? of->selects[r] : 0;
            int64_t *ids = of->ids + r * of->width, where[of->sizes[r] + 1], still = 0;
            int32_t *fixed = of->fixed + r * of->width;
            uint8_t picked[of->sizes[r] + 1];
            for (int64_t i = 0; i < select; i++, next++) {
                int64_t *text = by->texts + given->owners[row - 1] * by->stride + given->positions[row - select + i] + 1;
                of->bad[r] |= room->bad[next];
                *text = of->chosen[r * of->selected + i] = room->ids[next];
            }
            if (select && of->sizes[r]) ids[0] = room->ids[next - 1], fixed[0] = step;
            for (int64_t i = 0; i < of->sizes[r]; i++)
                if (ids[i] == of->mask) where[masked++] = i;
            if (of->rules[r] == ONE_STEP || step == of->lasts[r]) memset(picked, 1, masked);
            else if (masked)
                fastblt_pick(of->rules[r], of->bounds[r], room->confidences + next, room->entropies + next, masked,
                             picked);
            for (int64_t k = 0; k < masked; k++, next++) {
                of->bad[r] |= room->bad[next];
                if (picked[k]) ids[where[k]] = room->ids[next], fixed[where[k]] = step;
                else still++;
            }
            of->steps[r] = step;
            if (still && step < of->mosts[r]) {
                places[left] = rows, alive[left++] = r, rows += of->sizes[r];
                continue;
            }
            if (!of->sizes[r]) continue;
            int64_t *text = by->texts + given->owners[row] * by->stride + given->positions[row];
            memcpy(text, ids, sizeof(int64_t) * of->sizes[r]);
        }
        n = left, count = rows;
        /* The next pass has the blocks' rows alone. */
        for (int64_t j = 0, k = 0; j < n; j++) {
            int64_t r = alive[j], row = of->ends[r];
            for (int64_t i = 0; i < of->sizes[r]; i++, k++, row++) {
                room->owners[k] = given->owners[row], room->positions[k] = given->positions[row];
                room->firsts[k] = given->firsts[row], room->highs[k] = given->highs[row];
                room->latents[k] = given->latents[row], room->block[k] = (int32_t)of->ids[r * of->width + i];
            }
        }
        at.rows = room->owners, at.positions = room->positions, at.firsts = room->firsts, at.highs = room->highs;
        read.slots = room->latents, from.block = room->block;
        seconds[1] += now() - began;
    }
    return failed;
}

/* Makes the steps of all plans; `seconds` [2] become those of a thread in the decoder, and altogether. Returns 0, or 1
 * when memory ran out. */
int fastblt_decoder_steps(const struct part *decoder, const struct rows *given, const struct plans *of,
                        const struct latents *latents, const struct choice *by, int64_t threads, double *seconds) {
    int64_t most = 0, size = decoder->module->size, groups = (of->count + GROUP - 1) / GROUP;
    /* Each thread its share, as far as there are requests. */
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t apart = threads < of->count ? threads : of->count;
    groups = (groups + apart - 1) / apart * apart;
    if (groups > of->count) groups = of->count;
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = of->count * g / groups, last = of->count * (g + 1) / groups - 1;
        int64_t begin = first ? of->ends[first - 1] + of->sizes[first - 1] : 0;
        int64_t rows = of->ends[last] + of->sizes[last] - begin;
        most = rows > most ? rows : most;
    }
    int64_t each = sizeof(float) * (2 * size + by->vocabulary + 2) + 6 * sizeof(int32_t) + 2 * sizeof(int64_t) + 1;
    int64_t share = (most * each + 7) / 8 * 8;
    char *memory = malloc(apart * share);
    if (!memory) return 1;
    double inside = 0.0, all = 0.0;
    int failed = 0;
#pragma omp parallel for num_threads(apart) schedule(dynamic, 1) if (groups > 1) \
    reduction(| : failed) reduction(+ : inside, all)
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = of->count * g / groups, n = of->count * (g + 1) / groups - first;
        /* Widest first, so that all are aligned. */
        int64_t *longs = (int64_t *)(memory + omp_get_thread_num() * share);
        float *floats = (float *)(longs + 2 * most);
        int32_t *ints = (int32_t *)(floats + most * (2 * size + by->vocabulary + 2));
        struct room room = {ints, ints + most, ints + 2 * most, ints + 3 * most, ints + 4 * most, ints + 5 * most,
                            longs, longs + most, floats, floats + most * size, floats + 2 * most * size,
                            floats + most * (2 * size + by->vocabulary), floats + most * (2 * size + by->vocabulary + 1),
                            (uint8_t *)(ints + 6 * most)};
        double spent[2] = {0};
        failed |= steps(decoder, given, of, latents, by, first, n, groups > 1 ? 1 : threads, &room, spent);
        inside += spent[0], all += spent[1];
    }
    int64_t shared = groups > 1 ? apart : 1;
    seconds[0] = inside / shared, seconds[1] = all / shared;
    free(memory);
    return failed;
}
