/* Paged attention of ragged rows on a CPU, fp32. The mathematics and the shapes stand in paged_attention.py.
 *
 * Every row is computed alone, over its keys in order, tile by tile, so its result cannot depend on the rest of the
 * batch, on how a prompt was cut into chunks, or on where its pages lie. One row's keys and values are read once and in
 * the order they lie in.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exp_below.h"
#include "vector.h"

#define TILE 64

static void turn(const float *x, const float *turns, float *out, int64_t dim, float scale) {
    for (int64_t i = 0; i < dim / 2; i++) {
        float c = turns[2 * i], s = turns[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = (a * c - b * s) * scale;
        out[2 * i + 1] = (a * s + b * c) * scale;
    }
}

struct layout {
    int64_t heads, kv_heads, dim, page;
};

typedef int32_t i8 __attribute__((vector_size(32)));

/* The sums of eight vectors as one: pairs, then fours, then halves. */
static inline v8 sums(const v8 *a) {
#define PAIR(x, y) (__builtin_shuffle(x, y, (i8){0, 8, 2, 10, 4, 12, 6, 14}) + \
                    __builtin_shuffle(x, y, (i8){1, 9, 3, 11, 5, 13, 7, 15}))
#define FOUR(x, y) (__builtin_shuffle(x, y, (i8){0, 1, 8, 9, 4, 5, 12, 13}) + \
                    __builtin_shuffle(x, y, (i8){2, 3, 10, 11, 6, 7, 14, 15}))
    v8 low = FOUR(PAIR(a[0], a[1]), PAIR(a[2], a[3])), high = FOUR(PAIR(a[4], a[5]), PAIR(a[6], a[7]));
    return __builtin_shuffle(low, high, (i8){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(low, high, (i8){4, 5, 6, 7, 12, 13, 14, 15});
#undef PAIR
#undef FOUR
}

/* scores[j] = query . keys[j] for a whole tile; `dim` is a constant where this is inlined. What lies past `count` is
 * filled from the last key and never read. */
static inline __attribute__((always_inline)) void score_tile(const float *query, const float *const *keys,
                                                             int64_t offset, int64_t count, int64_t dim,
                                                             float *scores) {
    for (int64_t j = 0; j < count; j += 8) {
        v8 parts[8];
        for (int64_t i = 0; i < 8; i++) {
            const float *key = keys[j + i < count ? j + i : count - 1] + offset;
            v8 part = load(query) * load(key);
            for (int64_t d = 8; d < dim; d += 8) part += load(query + d) * load(key + d);
            parts[i] = part;
        }
        v8 eight = sums(parts);
        memcpy(scores + j, &eight, sizeof eight);
    }
}

/* out += sum of weights[j] * values[j], 32 numbers of `dim` at a time so that they stay in registers. */
static inline __attribute__((always_inline)) void mix_tile(const float *weights, const float *const *values,
                                                           int64_t offset, int64_t count, int64_t dim, float *out) {
    for (int64_t d = 0; d < dim; d += 32) {
        int64_t vectors = dim - d < 32 ? (dim - d) / 8 : 4;
        v8 kept[4];
        for (int64_t i = 0; i < vectors; i++) kept[i] = load(out + d + 8 * i);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < vectors; i++) kept[i] += weights[j] * load(values[j] + offset + d + 8 * i);
        memcpy(out + d, kept, sizeof(v8) * vectors);
    }
}

/* The heads [from, to) of one row over its keys [lo, hi). `q` is rotated and scaled; `scores` has TILE, `best` and `total`
 * one float a head. `dim` repeats the layout's, as a constant where the caller knows it. */
static inline __attribute__((always_inline)) void attend(const float *restrict q, const float *cache,
                                                         const int32_t *pages, int64_t lo, int64_t hi,
                                                         struct layout at, int64_t dim, float *restrict scores,
                                                         float *restrict best, float *restrict total,
                                                         float *restrict out, int64_t from, int64_t to) {
    int64_t stride = 2 * at.kv_heads * dim, groups = at.heads / at.kv_heads;
    for (int64_t h = from; h < to; h++) best[h] = -INFINITY, total[h] = 0.0f;
    memset(out + from * dim, 0, sizeof(float) * (to - from) * dim);
    for (int64_t base = lo; base < hi;) {
        /* Tiles end at multiples of TILE, whatever the page size: where a sum is cut depends on positions alone. */
        int64_t end = (base / TILE + 1) * TILE;
        if (end > hi) end = hi;
        int64_t count = end - base;
        const float *slots[TILE];
        for (int64_t p = base; p < end;) {
            const float *slot = cache + ((int64_t)pages[p / at.page] * at.page + p % at.page) * stride;
            int64_t stop = (p / at.page + 1) * at.page;
            for (stop = stop < end ? stop : end; p < stop; p++, slot += stride) slots[p - base] = slot;
        }
        for (int64_t h = from; h < to; h++)
            score_tile(q + h * dim, slots, h / groups * dim, count, dim, scores + h * TILE);
        for (int64_t h = from; h < to; h++) {
            float *score = scores + h * TILE, peak = best[h], sum = 0.0f;
#pragma omp simd reduction(max : peak)
            for (int64_t j = 0; j < count; j++) peak = score[j] > peak ? score[j] : peak;
            float shrink = exp_below(best[h] - peak);
            /* A score of NaN must reach the output, where it ends its own request. */
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; j++) {
                float s = score[j], e = exp_below(s - peak);
                score[j] = s == s ? e : s;
                sum += score[j];
            }
            total[h] = total[h] * shrink + sum;
            best[h] = peak;
            for (int64_t d = 0; d < dim; d++) out[h * dim + d] *= shrink;
            mix_tile(score, slots, (at.kv_heads + h / groups) * dim, count, dim, out + h * dim);
        }
        base = end;
    }
    for (int64_t h = from; h < to; h++) {
        float inverse = 1.0f / total[h];
        for (int64_t d = 0; d < dim; d++) out[h * dim + d] *= inverse;
    }
}

static void attend_row(const float *q, const float *cache, const int32_t *pages, int64_t lo, int64_t hi,
                       struct layout at, float *scores, float *best, float *total, float *out, int64_t from,
                       int64_t to) {
#define CASE(D) \
    case D: attend(q, cache, pages, lo, hi, at, D, scores, best, total, out, from, to); return;
    switch (at.dim) { CASE(16) CASE(32) CASE(64) CASE(128) }
    attend(q, cache, pages, lo, hi, at, at.dim, scores, best, total, out, from, to);
}

/* Where rows stand: as paged_attention.py says. A window of 0 is none. */
struct places {
    const float *turns;
    const int32_t *table, *rows, *positions, *firsts, *highs;
    int64_t window, table_stride, page;
};

static inline int64_t low_of(const struct places *where, int64_t row) {
    int64_t low = where->firsts[row] - where->window + 1;
    return where->window && low > 0 ? low : 0;
}

static inline struct layout layout_of(const struct places *where, int64_t heads, int64_t kv_heads, int64_t dim) {
    return (struct layout){heads, kv_heads, dim, where->page};
}

/* Writes the keys, rotated, and values of rows [first, first + n); k and v begin with the first of them. */
static void write_rows(const float *k, const float *v, const struct places *where, struct layout at, int64_t first,
                       int64_t n, float *cache) {
    int64_t size = at.kv_heads * at.dim;
    for (int64_t i = first; i < first + n; i++, k += size, v += size) {
        int64_t p = where->positions[i], page = where->table[where->rows[i] * where->table_stride + p / at.page];
        float *slot = cache + (page * at.page + p % at.page) * 2 * size;
        for (int64_t h = 0; h < at.kv_heads; h++)
            turn(k + h * at.dim, where->turns + p * at.dim, slot + h * at.dim, at.dim, 1);
        memcpy(slot + size, v, sizeof(float) * size);
    }
}

/* The heads [from, to) of rows [first, first + n) attend; q and out begin with the first of them. Returns 0, or 1 when
 * memory ran out. */
static int attend_heads(const float *q, const float *cache, const struct places *where, struct layout at, int64_t first,
                        int64_t n, int64_t from, int64_t to, float *out) {
    float *turned = malloc(sizeof(float) * at.heads * (size_t)(at.dim + TILE + 2));
    if (!turned) return 1;
    float scale = 1.0f / sqrtf((float)at.dim), *scores = turned + at.heads * at.dim, *best = scores + at.heads * TILE;
    for (int64_t i = first; i < first + n; i++, q += at.heads * at.dim, out += at.heads * at.dim) {
        for (int64_t h = from; h < to; h++)
            turn(q + h * at.dim, where->turns + (int64_t)where->positions[i] * at.dim, turned + h * at.dim, at.dim, scale);
        attend_row(turned, cache, where->table + where->rows[i] * where->table_stride, low_of(where, i), where->highs[i],
                   at, scores, best, best + at.heads, out, from, to);
    }
    free(turned);
    return 0;
}

static int attend_rows(const float *q, const float *cache, const struct places *where, struct layout at, int64_t first,
                       int64_t n, float *out) {
    return attend_heads(q, cache, where, at, first, n, 0, at.heads, out);
}

/* All keys and values are written before any row attends. Returns 0, or 1 when memory ran out. */
int fastblt_paged_attention(const float *q, const float *k, const float *v, const struct places *where, float *cache,
                            int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t threads, float *out) {
    struct layout at = layout_of(where, heads, kv_heads, dim);
    int64_t work = 0;
    write_rows(k, v, where, at, 0, n, cache);
    for (int64_t i = 0; i < n; i++) work += where->highs[i] - low_of(where, i);
    /* Waking a second thread costs more than a small pass. */
    if (threads < 2 || work * heads * dim <= 100000) return attend_rows(q, cache, where, at, 0, n, out);
    int failed = 0;
    /* Few rows are shared out by heads. */
    int64_t parts = n < threads ? threads : 1, size = heads * dim;
    if (parts > heads) parts = heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
    for (int64_t i = 0; i < n * parts; i++) {
        int64_t row = i / parts, part = i % parts;
        failed |= attend_heads(q + row * size, cache, where, at, row, 1, heads * part / parts, heads * (part + 1) / parts,
                               out + row * size);
    }
    return failed;
}
