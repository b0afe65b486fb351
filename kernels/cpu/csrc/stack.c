/* All of a module over the rows of a pass, on a CPU, fp32: what the rows begin as, the layers (models/layers.py), and
 * what becomes of the rows. stack.py has the shapes.
 *
 * Threads share the rows. Rows of different requests have nothing to do with each other, so where a pass is small
 * and requests can be shared out evenly each thread takes its own through all layers. Otherwise the threads wait for
 * each other at every layer, so that all keys and values are there, and share out each layer's rows anew, as they
 * come to be free. Every row is computed as if it were alone, so none of this changes a result.
 */
#include "stack.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dense.h"
#include "exp_below.h"
#include "export.h"
#include "latent_attention.h"
#include "team.h"

/* Work of a pass for which the threads wait at every layer, however even their shares are. */
#define LARGE 60000
/* Rows that go from one layer's keys and values to the next layer's together. */
#define SPAN BLOCK
/* What the dense part of a row costs, in keys that it could attend to in that time; and what a thread must have to do,
 * in the same unit, to be worth its waking. */
#define ROW 160
#define LEAST 2000

/* What rows [first, first + n) begin as. */
static void begin_rows(const struct source *from, const struct places *at, int64_t first, int64_t n, int64_t size,
                       float *x) {
    for (int64_t i = first; i < first + n; i++) {
        int64_t window = at->rows[i] * from->stride + at->positions[i];
        float *row = x + i * size;
        if (from->block && from->block[i] >= 0) {
            memcpy(row, from->block_table + from->block[i] * size, sizeof(float) * size);
        } else if (from->hashed) {
            embed(from->ids + window, from->hashed, row);
        } else if (from->table) {
            memcpy(row, from->table + from->ids[window + from->pad] * size, sizeof(float) * size);
        } else {
            int64_t slot = slot_of(&from->pages, at->rows[i], at->positions[i]);
            memcpy(row, from->states + slot * size, sizeof(float) * size);
        }
    }
}

/* Nats of softmax(z). NaN stays. */
static float entropy_of(const float *z, int64_t count) {
    float peak = z[0], total = 0.0f, mean = 0.0f;
    for (int64_t i = 1; i < count; i++) peak = z[i] > peak || z[i] != z[i] ? z[i] : peak;
#pragma omp simd reduction(+ : total, mean)
    for (int64_t i = 0; i < count; i++) {
        /* No infinity, which times nothing would be no number. */
        float below = z[i] - peak < -87.0f ? -87.0f : z[i] - peak, e = exp_below(below);
        total += e;
        mean += e * below;
    }
    return logf(total) - mean / total;
}

/* What becomes of rows [first, first + n). Returns 0, or 1 when memory ran out. */
static int end_rows(const struct sink *to, const struct places *at, int64_t first, int64_t n, int64_t size, float *x) {
    float *rows = x + first * size;
    if (to->gain) fastblt_rms_norm(rows, n, size, to->gain, to->eps, rows);
    if (to->states)
        for (int64_t i = first; i < first + n; i++) {
            int64_t slot = slot_of(&to->pages, at->rows[i], at->positions[i]);
            memcpy(to->states + slot * size, x + i * size, sizeof(float) * size);
        }
    if (!to->head) return 0;
    float *logits = malloc(sizeof(float) * BLOCK * to->vocabulary);
    if (!logits) return 1;
    for (int64_t done = 0; done < n; done += BLOCK) {
        int64_t count = n - done < BLOCK ? n - done : BLOCK;
        linear_map(rows + done * size, count, size, to->head,
                   (struct target){.out = logits, .size = to->vocabulary});
        for (int64_t i = 0; i < count; i++)
            to->entropies[first + done + i] = entropy_of(logits + i * to->vocabulary, to->vocabulary);
    }
    free(logits);
    return 0;
}

static int64_t work_of(const struct places *at, int64_t row) { return ROW + at->highs[row] - low_of(at, row); }

/* Cuts the rows into shares [starts[p], starts[p + 1]) of about the same work, between requests; a row of the null
 * request belongs to nobody. Returns the work of the largest share. */
static int64_t cut(const struct places *at, int64_t n, int64_t total, int64_t parts, int64_t *starts) {
    int64_t done = 0, own = 0, largest = 0, p = 1;
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        int between = !i || at->rows[i] != at->rows[i - 1] || !at->rows[i];
        if (own && between && p < parts && done * parts >= total * p) {
            largest = own > largest ? own : largest;
            starts[p++] = i;
            own = 0;
        }
        own += work_of(at, i);
        done += work_of(at, i);
    }
    while (p <= parts) starts[p++] = n;
    return own > largest ? own : largest;
}

/* Cuts the rows anywhere into shares that threads take as they come, each half of what is left for all of them, so that
 * the last ones are small. Returns how many; `starts` has room for n + 1. */
static int64_t cut_finer(const struct places *at, int64_t n, int64_t total, int64_t threads, int64_t *starts) {
    int64_t left = total, own = 0, share = left / (2 * threads), p = 0;
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        own += work_of(at, i);
        if (own < share || own < LEAST) continue;
        starts[++p] = i + 1;
        left -= own;
        own = 0;
        share = left / (2 * threads);
    }
    if (starts[p] < n) starts[++p] = n;
    return p;
}

/* What a layer makes of rows [first, first + n) when all keys and values are written, in place. */
static int finish(const struct module *m, const struct layer *w, const float *cache, const struct places *at,
                  int64_t first, int64_t n, const float *q, float *attended, float *x) {
    int failed = attend_rows(q, cache, at, layout_of(at, m->heads, m->kv_heads, m->dim), first, n, attended);
    fastblt_project_add(attended, n, m->heads * m->dim, w->out, m->size, x, 1, x);
    return failed |
           fastblt_feed_forward(x, n, m->size, w->inner_gain, w->inner_eps, w->gate, w->up, m->inner, w->down, x);
}

/* Step i of rows [first, first + n), at most SPAN: behind the keys and values of layer i - 1, up to those of layer
 * i. What a row needs of others is done when all rows have made the step before. `scratch` has room for what is
 * attended, keys and values of the rows. Returns 0, or 1 when memory ran out. */
static int advance(const struct pass *p, int64_t i, int64_t first, int64_t n, float *scratch) {
    const struct module *m = p->module;
    const struct places *at = p->at;
    int64_t wide = m->heads * m->dim, narrow = m->kv_heads * m->dim;
    float *q = p->queries + first * wide, *x = p->x + first * m->size;
    float *attended = scratch, *k = attended + n * wide, *v = k + n * narrow;
    const uint8_t *read = p->to && p->to->read && i == m->count ? p->to->read + first : NULL;
    int failed = 0;
    if (!i && p->from) begin_rows(p->from, at, first, n, m->size, p->x);
    for (int64_t from = 0, stop; i && from < n; from = stop) {
        for (stop = read ? from + 1 : n; stop < n && read[stop] == read[from];) stop++;
        if (!read || read[from])
            failed |= finish(m, m->layers + i - 1, p->caches[i - 1], at, first + from, stop - from, q + from * wide,
                             attended, x + from * m->size);
    }
    if (i == m->count) return p->to ? failed | end_rows(p->to, at, first, n, m->size, p->x) : failed;
    const struct layer *w = m->layers + i;
    const struct latents *latents = p->latents;
    if (w->cross_queries) {
        struct linear queries[] = {{w->cross_queries, wide, q}};
        failed |= fastblt_project(x, n, m->size, w->cross_gain, w->cross_eps, queries, 1);
        failed |= fastblt_latent_attention(q, latents->store + i * latents->layer_size, latents->slots + first,
                                           latents->slot_size, n, m->heads, m->kv_heads, m->dim, latents->keys, 1,
                                           attended);
        fastblt_project_add(attended, n, wide, w->cross_out, m->size, x, 2, x);
    }
    struct linear maps[] = {{w->queries, wide, q}, {w->keys, narrow, k}, {w->values, narrow, v}};
    failed |= fastblt_project(x, n, m->size, w->gain, w->eps, maps, 3);
    write_rows(k, v, at, layout_of(at, m->heads, m->kv_heads, m->dim), first, n, p->caches[i]);
    return failed;
}

/* Step i of any number of rows. */
static int advance_all(const struct pass *p, int64_t i, int64_t first, int64_t n, float *scratch) {
    int failed = 0;
    for (int64_t done = 0; done < n; done += SPAN)
        failed |= advance(p, i, first + done, n - done < SPAN ? n - done : SPAN, scratch);
    return failed;
}

int go_through(const struct pass *p, int64_t first, int64_t n, float *scratch) {
    int failed = 0;
    for (int64_t i = 0; i <= p->module->count; i++) failed |= advance_all(p, i, first, n, scratch);
    return failed;
}

/* A pass that threads share: one step of it, or (-1) all of them. */
struct sharing {
    const struct pass *pass;
    const int64_t *starts;
    int64_t n, step;
    float *scratch;
    _Atomic int failed;
};

static void advance_share(void *with, int64_t item, int64_t room) {
    struct sharing *all = with;
    const struct pass *p = all->pass;
    float *own = all->scratch + floats_of(p->module, all->n, room);
    int64_t first = all->starts[item], n = all->starts[item + 1] - first;
    /* After a failure the rest goes on. */
    if (all->step < 0 ? go_through(p, first, n, own) : advance_all(p, all->step, first, n, own)) all->failed = 1;
}

/* Queries of all rows, and for each thread what `advance` needs. */
int64_t floats_of(const struct module *m, int64_t n, int64_t threads) {
    return n * m->heads * m->dim + threads * (n < SPAN ? n : SPAN) * (m->heads + 2 * m->kv_heads) * m->dim;
}

EXPORT int fastblt_stack(const struct module *module, float *const *caches, const struct places *at,
                         const struct latents *latents, const struct source *from, const struct sink *to, int64_t n,
                         int64_t threads, float *x) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) total += work_of(at, i);
    int64_t parts = total / LEAST < threads ? total / LEAST : threads;
    if (parts > MOST_THREADS) parts = MOST_THREADS;
    if (parts < 1) parts = 1;
    float *scratch = malloc(sizeof(float) * (floats_of(module, n, rooms_for(parts)) + 1));
    int64_t *starts = malloc(sizeof(int64_t) * (n + MOST_THREADS + 1));
    if (!scratch || !starts) {
        free(scratch);
        free(starts);
        return 1;
    }
    struct pass p = {
        .module = module,
        .caches = caches,
        .at = at,
        .latents = latents,
        .from = from,
        .to = to,
        .x = x,
        .queries = scratch,
    };
    struct sharing all = {.pass = &p, .starts = starts, .n = n, .step = -1, .scratch = scratch};
    if (parts < 2) {
        all.failed = go_through(&p, 0, n, scratch + floats_of(module, n, 0));
    } else if (total <= LARGE && cut(at, n, total, parts, starts) * parts <= total + total / 4) {
        share_out(advance_share, &all, parts, parts);
    } else {
        int64_t shares = cut_finer(at, n, total, parts, starts);
        for (all.step = 0; all.step <= module->count; all.step++) share_out(advance_share, &all, shares, parts);
    }
    free(scratch);
    free(starts);
    return all.failed;
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void add_stretch(struct stretch *rows, int32_t owner, int32_t from, int32_t until) {
    for (int32_t p = from; p < until; p++) {
        rows->owners[rows->n] = owner;
        rows->positions[rows->n] = p;
        rows->highs[rows->n++] = p + 1;
    }
}

int pass_along(const struct part *parts, int module, const struct stretch *rows, int beside, int64_t threads, float *x,
               float *entropies, struct spent *spent) {
    const struct part *part = parts + module;
    struct places at = *part->at;
    struct sink to = *part->to;
    double began = seconds();
    int failed = 0;
    at.rows = rows->owners;
    at.positions = at.firsts = rows->positions;
    at.highs = rows->highs;
    to.entropies = entropies;
    if (rows->n) failed = fastblt_stack(part->module, part->caches, &at, NULL, part->from, &to, rows->n, threads, x);
    spent->seconds[module] += seconds() - began;
    spent->rows[beside] += rows->n;
    return failed;
}
