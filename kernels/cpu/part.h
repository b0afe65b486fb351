/* A module over the paged caches of running requests, for calls that make several passes; behind stack.c. */
#pragma once
#include <time.h>

struct part {
    const struct module *module;
    float *const *caches;
    const struct places *at;
    const struct source *from;
    const struct sink *to;
};

/* What a call has of them. */
enum { PATCHER, ENCODER, DECODER, MODULES };

/* Passes beside the steps, whose rows are counted: first rows encoded, new ones scanned, and encoded. */
enum { FRESH, SCANNED, AHEAD, BESIDE };

/* Where a thread's seconds go, by module and altogether, and how many rows the passes beside the steps had. */
struct spent {
    double seconds[MODULES + 1];
    int64_t rows[BESIDE];
};

static void add_spent(struct spent *to, const struct spent *other) {
    for (int64_t i = 0; i <= MODULES; i++) to->seconds[i] += other->seconds[i];
    for (int64_t i = 0; i < BESIDE; i++) to->rows[i] += other->rows[i];
}

#pragma omp declare reduction(add : struct spent : add_spent(&omp_out, &omp_in))

/* Seconds of a clock. */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Rows that follow each other in texts, a stretch of each of some requests. */
struct stretch {
    int32_t *owners, *positions, *highs;
    int64_t n;
};

/* Positions [from, until) of a request. */
static void stretch_to(struct stretch *rows, int32_t owner, int32_t from, int32_t until) {
    for (int32_t p = from; p < until; p++) {
        rows->owners[rows->n] = owner, rows->positions[rows->n] = p, rows->highs[rows->n++] = p + 1;
    }
}

/* The rows through a module, as a pass beside the steps; x has room for them. Returns 0, or 1 when memory ran out. */
static int pass_along(const struct part *parts, int module, const struct stretch *rows, int beside, int64_t threads,
                      float *x, float *entropies, struct spent *spent) {
    const struct part *part = parts + module;
    struct places at = *part->at;
    struct sink to = *part->to;
    double began = now();
    at.rows = rows->owners, at.positions = at.firsts = rows->positions, at.highs = rows->highs;
    to.entropies = entropies;
    int failed =
        rows->n && fastblt_stack(part->module, part->caches, &at, NULL, part->from, &to, rows->n, threads, x);
    spent->seconds[module] += now() - began;
    spent->rows[beside] += rows->n;
    return failed;
}
