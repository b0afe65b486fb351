/* A module over the rows of a pass: stack.py has the shapes. Behind fastblt_stack stands what calls of several passes
 * (multi_step.c, decoder_steps.c) use of it. */
#pragma once
#include <stdint.h>

#include "dense.h"
#include "hash_embedding.h"
#include "paged_attention.h"
#include "paged_rows.h"

#define MOST_THREADS 64

/* Weights of a layer, packed as in dense.py. The first three are of a cross-attention before it, or NULL. */
struct layer {
    const float *cross_gain;
    const struct packed *cross_queries, *cross_out;
    const float *gain;
    const struct packed *queries, *keys, *values, *out;
    const float *inner_gain;
    const struct packed *gate, *up, *down;
    float cross_eps, eps, inner_eps;
};

/* `count` layers over rows of `size` numbers, whose feed-forwards have `inner` numbers inside. */
struct module {
    const struct layer *layers;
    int64_t count, size, inner, heads, kv_heads, dim;
};

/* The latents that cross-attentions read: a slot of so many floats for each row, and in it so many for each layer. */
struct latents {
    const float *store;
    const int32_t *slots;
    int64_t slot_size, layer_size, keys;
};

/* What rows begin as: where `block` has an id, that row of `block_table`; else, of the request's ids (`pad` of them
 * before its first), the hashed windows or the rows of a table; or kept states. */
struct source {
    const int32_t *block;
    const float *block_table;
    const int64_t *ids;
    int64_t stride, pad;
    const struct tables *hashed;
    const float *table, *states;
    struct pages pages;
};

/* What becomes of them: a norm; entropies of what the head makes of them; states to keep. Each where it is not NULL.
 * Of rows that are not `read`, where that is given, nothing is wanted but the keys and values that later rows attend
 * to. */
struct sink {
    const uint8_t *read;
    const float *gain;
    const struct packed *head;
    float *entropies, *states;
    struct pages pages;
    int64_t vocabulary;
    float eps;
};

/* Rows x [n, size] through the module, in place, with a cache for each layer. Where there is a source, what x holds
 * before does not matter. Returns 0, or 1 when memory ran out. */
int fastblt_stack(const struct module *module, float *const *caches, const struct places *at,
                  const struct latents *latents, const struct source *from, const struct sink *to, int64_t n,
                  int64_t threads, float *x);

/* A pass: rows x [.., size] through the layers of a module, in place. */
struct pass {
    const struct module *module;
    float *const *caches;
    const struct places *at;
    const struct latents *latents;
    const struct source *from;
    const struct sink *to;
    float *x, *queries;
};

/* Rows [first, first + n) that need no others through the whole module. `scratch` has `floats_of` floats, less the
 * pass's queries. Returns 0, or 1 when memory ran out. */
int go_through(const struct pass *p, int64_t first, int64_t n, float *scratch);

/* Floats that a pass of so many rows needs beside them. */
int64_t floats_of(const struct module *m, int64_t n, int64_t threads);

/* A module over the paged caches of running requests. */
struct part {
    const struct module *module;
    float *const *caches;
    const struct places *at;
    const struct source *from;
    const struct sink *to;
};

/* The parts of a call of several passes, in this order. */
enum { PATCHER, ENCODER, DECODER, MODULES };

/* Passes beside the steps, whose rows are counted: first rows encoded, new ones scanned by the entropy model, and
 * new ones encoded. */
enum { FRESH_ROWS, SCANNED_ROWS, AHEAD_ROWS, BESIDE };

/* Where a thread's seconds go, by module and altogether, and how many rows the passes beside the steps had. */
struct spent {
    double seconds[MODULES + 1];
    int64_t rows[BESIDE];
};

static inline void add_spent(struct spent *to, const struct spent *other) {
    for (int64_t i = 0; i <= MODULES; i++) to->seconds[i] += other->seconds[i];
    for (int64_t i = 0; i < BESIDE; i++) to->rows[i] += other->rows[i];
}

/* Seconds of a clock. */
double seconds(void);

/* Rows that follow each other in texts, a stretch of each of some requests. */
struct stretch {
    int32_t *owners, *positions, *highs;
    int64_t n;
};

/* Appends positions [from, until) of a request. */
void add_stretch(struct stretch *rows, int32_t owner, int32_t from, int32_t until);

/* The rows through a module, as a pass beside the steps; x has room for them. Returns 0, or 1 when memory ran out. */
int pass_along(const struct part *parts, int module, const struct stretch *rows, int beside, int64_t threads, float *x,
               float *entropies, struct spent *spent);
