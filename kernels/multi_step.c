/* Several bytes of each request in one call, on a CPU, fp32: as many single rows one after another. What a step computes
 * stands in multi_step.py.
 *
 * Threads share the requests in groups, and a group makes all of its steps before the next begins: what its requests have
 * in their windows is then read from memory once and not once a byte, and nobody waits for another's step. Every row is
 * computed as if it were alone, so neither groups nor threads change a result.
 */
#include "choice.h"
#include "stack.c"
#include "part.h"

/* Requests of a group: few enough for their keys and values to stay in the caches from step to step. */
#define GROUP 4

/* Of every module in turn: entropy model, encoder, decoder. */
enum { PATCHER, ENCODER, DECODER, MODULES };

/* By request in the order of the call: where it stands, what it may do, and what became of it. */
struct requests {
    const int32_t *owners, *starts, *latents, *limits, *scans, *opened;
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

static int one_pass(const struct part *part, const struct step *s, const struct latents *latents, float *entropies,
                float *scratch, float *x, double *seconds) {
    double began = now();
    struct places at = *part->at;
    at.rows = s->owners, at.positions = at.firsts = s->positions, at.highs = s->highs;
    struct sink to = *part->to;
    to.entropies = entropies;
    int failed = run(part->module, part->caches, &at, latents, part->from, &to, 0, s->n, 0, scratch, x);
    *seconds += now() - began;
    return failed;
}

static void join(struct step *to, const struct step *from, int64_t j, int32_t further) {
    int64_t k = to->n++;
    to->owners[k] = from->owners[j], to->latents[k] = from->latents[j], to->request[k] = from->request[j];
    to->positions[k] = from->positions[j] + further, to->highs[k] = to->positions[k] + 1;
}

/* Chooses the bytes of a step's rows from their decoder states x. */
static void choose_bytes(const struct choice *by, const struct step *s, int64_t size, const float *x, float *logits,
                   int64_t *ids, uint8_t *bad) {
    int64_t positions[GROUP];
    map(x, s->n, size, by->head, (struct target){logits, NULL, by->vocabulary, 0});
    for (int64_t j = 0; j < s->n; j++) positions[j] = s->positions[j] + 1;
    choose_rows(by, logits, s->owners, positions, s->n, ids, NULL, NULL, bad);
}

/* Requests [first, first + n) to the end of their steps. Returns 0, or 1 when memory ran out. */
static int steps(const struct part *parts, const struct requests *of, const struct latents *latents,
                 const struct choice *by, const struct rule *rule, int64_t first, int64_t n, float *scratch, float *x,
                 float *logits, double *seconds) {
    struct step now_, scan, next;
    struct latents read = *latents;
    int64_t ids[GROUP];
    float entropies[GROUP];
    uint8_t bad[GROUP];
    int failed = 0;
    read.slots = now_.latents;
    now_.n = 0;
    for (int64_t r = first; r < first + n; r++) {
        int64_t k = now_.n++;
        now_.owners[k] = of->owners[r], now_.latents[k] = of->latents[r], now_.request[k] = (int32_t)r;
        now_.positions[k] = of->starts[r], now_.highs[k] = of->starts[r] + 1;
    }
    while (now_.n) {
        failed |= one_pass(parts + DECODER, &now_, &read, NULL, scratch, x, seconds + DECODER);
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
        if (scan.n) failed |= one_pass(parts + PATCHER, &scan, NULL, entropies, scratch, x, seconds + PATCHER);
        for (int64_t j = 0; j < scan.n; j++) {
            int64_t r = scan.request[j], length = scan.positions[j] + 1 - of->opened[r];
            of->entropies[r * of->most + of->scanned[r]++] = entropies[j];
            int closed = entropies[j] > rule->threshold || (rule->longest && length >= rule->longest);
            if (!closed && of->made[r] < of->limits[r]) join(&next, &scan, j, 0);
        }
        now_ = next;
        if (rule->fed) {
            if (now_.n) failed |= one_pass(parts + ENCODER, &now_, NULL, NULL, scratch, x, seconds + ENCODER);
        } else {
            /* A drafted row starts from its id; the states of a fixed one are pooled later. */
            scan.n = 0;
            for (int64_t j = 0; j < now_.n; j++)
                if (of->opened[now_.request[j]] >= 0) join(&scan, &now_, j, 0);
            if (scan.n) failed |= one_pass(parts + ENCODER, &scan, NULL, NULL, scratch, x, seconds + ENCODER);
        }
    }
    return failed;
}

/* Makes the bytes of all requests; `seconds` [MODULES] become those of a thread in each module. Returns 0, or 1 when
 * memory ran out. */
int fastblt_multi_step(const struct part *parts, const struct requests *of, const struct latents *latents,
                       const struct choice *by, const struct rule *rule, int64_t threads, double *seconds) {
    int64_t size = 0, each = 0, groups = (of->count + GROUP - 1) / GROUP;
    for (int64_t i = 0; i < MODULES; i++) {
        const struct module *m = parts[i].module;
        int64_t own = 2 * (m->heads + m->kv_heads) * m->dim;
        size = m->size > size ? m->size : size, each = own > each ? own : each;
    }
    /* Each thread its share, as far as there are requests. */
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > of->count) threads = of->count;
    groups = (groups + threads - 1) / threads * threads;
    if (groups > of->count) groups = of->count;
    int64_t room = GROUP * (size + each + by->vocabulary + PANEL);
    float *memory = malloc(sizeof(float) * threads * room);
    if (!memory) return 1;
    double patcher = 0.0, encoder = 0.0, decoder = 0.0;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1) \
    reduction(| : failed) reduction(+ : patcher, encoder, decoder)
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = of->count * g / groups, n = of->count * (g + 1) / groups - first;
        float *x = memory + omp_get_thread_num() * room, *scratch = x + GROUP * size;
        double spent[MODULES] = {0};
        failed |= steps(parts, of, latents, by, rule, first, n, scratch, x, scratch + GROUP * each, spent);
        patcher += spent[PATCHER], encoder += spent[ENCODER], decoder += spent[DECODER];
    }
    seconds[PATCHER] = patcher / threads, seconds[ENCODER] = encoder / threads, seconds[DECODER] = decoder / threads;
    free(memory);
    return failed;
}
