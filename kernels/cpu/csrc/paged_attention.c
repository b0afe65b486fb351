/* Paged attention of ragged rows on a CPU, fp32.
 *
 * Rows of one request read a tile of its keys and values together. Still each row's sums are those that it has alone,
 * over its keys in order, tile by tile, so its result cannot depend on the rest of the batch, on how a prompt was cut
 * into chunks, or on where its pages lie.
 */
#include "paged_attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "exp_below.h"
#include "export.h"
#include "vector.h"

#define TILE 64
/* Scores of a query: of a tile, and up to seven behind it. */
#define WIDE (TILE + 8)
/* Rows of a request that read a tile together, at most. */
#define ROWS 16

static void turn(const float *restrict x, const float *restrict turns, float *restrict out, int64_t dim, float scale) {
    for (int64_t i = 0; i < dim / 2; i++) {
        float c = turns[2 * i], s = turns[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = (a * c - b * s) * scale;
        out[2 * i + 1] = (a * s + b * c) * scale;
    }
}

/* The sums of eight vectors as one: pairs, then fours, then halves. */
static inline v8 sums(const v8 *a) {
#define ADD(x, y) (__builtin_shuffle(x, y, (i8){0, 2, 8, 10, 4, 6, 12, 14}) + \
                   __builtin_shuffle(x, y, (i8){1, 3, 9, 11, 5, 7, 13, 15}))
    v8 low = ADD(ADD(a[0], a[1]), ADD(a[2], a[3])), high = ADD(ADD(a[4], a[5]), ADD(a[6], a[7]));
    return __builtin_shuffle(low, high, (i8){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(low, high, (i8){4, 5, 6, 7, 12, 13, 14, 15});
#undef ADD
}

/* scores[q][j] = queries[q] . keys[j] for `count` queries over keys [from, to) of a tile; `dim` is a constant where
 * this is inlined. Up to seven scores behind are written too, and never read. Two queries share four keys at a time;
 * either way a score is the same sum. Sums begin with zero: of two products a compiler may fuse either with their
 * sum. */
static inline __attribute__((always_inline)) void score_tile(const float *queries, int64_t count,
                                                             const float *const *keys, int64_t offset, int64_t from,
                                                             int64_t to, int64_t dim, float *scores) {
    for (int64_t j = from; j < to; j += 8) {
        const float *key[8];
        for (int64_t i = 0; i < 8; i++) key[i] = keys[j + i < to ? j + i : to - 1] + offset;
        /* Many queries over eight keys hide from the processor which keys come next. */
        for (int64_t i = j + 8; i < j + 16 && i < to; i++)
            for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(keys[i] + offset + d);
        const float *query = queries;
        float *score = scores + j;
        int64_t q = 0;
        for (; q + 2 <= count; q += 2, query += 2 * dim, score += 2 * WIDE)
            for (int64_t half = 0; half < 8; half += 4) {
                v8 parts[8] = {0};
                for (int64_t d = 0; d < dim; d += 8) {
                    v8 one = load(query + d), two = load(query + dim + d);
                    v8 four[4];
                    for (int64_t i = 0; i < 4; i++) four[i] = load(key[half + i] + d);
                    for (int64_t i = 0; i < 4; i++) parts[i] += one * four[i], parts[4 + i] += two * four[i];
                }
                v8 eight = sums(parts);
                memcpy(score + half, &eight, sizeof eight / 2);
                memcpy(score + WIDE + half, (float *)&eight + 4, sizeof eight / 2);
            }
        if (q < count) {
            v8 parts[8] = {0};
            for (int64_t i = 0; i < 8; i++)
                for (int64_t d = 0; d < dim; d += 8) parts[i] += load(query + d) * load(key[i] + d);
            v8 eight = sums(parts);
            memcpy(score, &eight, sizeof eight);
        }
    }
}

/* kept += sum of weights[j] * values[j] over j of [from, to). */
static inline __attribute__((always_inline)) void add(v8 *kept, const float *weights, const float *const *values,
                                                      int64_t offset, int64_t from, int64_t to, int64_t vectors) {
    for (int64_t j = from; j < to; j++)
        for (int64_t i = 0; i < vectors; i++) kept[i] += weights[j] * load(values[j] + offset + 8 * i);
}

/* out[q] += sum of weights[q][j] * values[j] over j of [lows[q], highs[q]) in their order, for up to three queries:
 * alone, beside each other where all see a value, alone. So many `vectors` of each stay in registers; they and `count`
 * are constants where this is inlined. */
static inline __attribute__((always_inline)) void mix(const float *weights, int64_t count, const int64_t *lows,
                                                      const int64_t *highs, const float *const *values, int64_t offset,
                                                      int64_t dim, int64_t vectors, float *out) {
    const float *second = weights + WIDE, *third = second + WIDE;
    int64_t all = lows[0], until = highs[0];
    for (int64_t q = 1; q < count; q++) {
        all = lows[q] > all ? lows[q] : all;
        until = highs[q] < until ? highs[q] : until;
    }
    if (all > until) all = until = TILE;
    v8 a[4], b[4], c[4];
    for (int64_t i = 0; i < vectors; i++) {
        a[i] = load(out + 8 * i);
        if (count > 1) b[i] = load(out + dim + 8 * i);
        if (count > 2) c[i] = load(out + 2 * dim + 8 * i);
    }
    if (count > 1) {
        add(a, weights, values, offset, lows[0], all < highs[0] ? all : highs[0], vectors);
        add(b, second, values, offset, lows[1], all < highs[1] ? all : highs[1], vectors);
    }
    if (count > 2) add(c, third, values, offset, lows[2], all < highs[2] ? all : highs[2], vectors);
    for (int64_t j = all; j < until; j++)
        for (int64_t i = 0; i < vectors; i++) {
            v8 value = load(values[j] + offset + 8 * i);
            a[i] += weights[j] * value;
            if (count > 1) b[i] += second[j] * value;
            if (count > 2) c[i] += third[j] * value;
        }
    if (count > 1) {
        add(a, weights, values, offset, until, highs[0], vectors);
        add(b, second, values, offset, until, highs[1], vectors);
    }
    if (count > 2) add(c, third, values, offset, until, highs[2], vectors);
    for (int64_t i = 0; i < vectors; i++) {
        memcpy(out + 8 * i, a + i, sizeof *a);
        if (count > 1) memcpy(out + dim + 8 * i, b + i, sizeof *b);
        if (count > 2) memcpy(out + 2 * dim + 8 * i, c + i, sizeof *c);
    }
}

/* The same over all of `dim`. */
static inline __attribute__((always_inline)) void mix_tile(const float *weights, int64_t count, const int64_t *lows,
                                                           const int64_t *highs, const float *const *values,
                                                           int64_t offset, int64_t dim, float *out) {
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) mix(weights, count, lows, highs, values, offset + d, dim, 4, out + d);
    if (dim % 32 >= 16) mix(weights, count, lows, highs, values, offset + d, dim, 2, out + d), d += 16;
    if (dim % 16) mix(weights, count, lows, highs, values, offset + d, dim, 1, out + d);
}

/* Makes weights of one query's scores in a tile, and brings what was mixed before to their scale. Not inlined: the sums
 * that a compiler makes of it must not depend on where it is called. */
static __attribute__((noinline)) void weigh(float *restrict score, int64_t count, int64_t dim, float *restrict best,
                                            float *restrict total, float *restrict out) {
    v8 peaks = (v8){0} + *best, sum = {0};
    float peak = *best, all = 0.0f;
    for (int64_t j = count; j % 8; j++) score[j] = -INFINITY;
    for (int64_t j = 0; j < count; j += 8) {
        v8 eight = load(score + j);
        peaks = choose(eight > peaks, eight, peaks);
    }
    for (int64_t i = 0; i < 8; i++) peak = peaks[i] > peak ? peaks[i] : peak;
    /* A score of NaN stays one, and ends its own request; what lies behind the last adds less than can be seen. */
    for (int64_t j = 0; j < count; j += 8) {
        v8 eight = exp_eight(load(score + j) - peak);
        sum += eight;
        memcpy(score + j, &eight, sizeof eight);
    }
    for (int64_t i = 0; i < 8; i++) all += sum[i];
    float shrink = exp_below(*best - peak);
    *total = *total * shrink + all;
    *best = peak;
    for (int64_t d = 0; d < dim; d++) out[d] *= shrink;
}

/* Rows of one request that attend together, from `first` on, each over its keys [lows, highs); these overlap, so that
 * nothing between `low` and `high` is a key of none. */
struct block {
    int64_t first, count, lows[ROWS], highs[ROWS], low, high;
};

/* Of every query of a block, head by head and in a head row by row: what was rotated, what is mixed, and its scores. */
struct scratch {
    float *queries, *mixed, *best, *total, *scores;
};

/* Where the keys [base + from, base + to) lie; `base` is a multiple of TILE, so where a sum is cut depends on positions
 * alone. */
struct tile {
    const float *slots[TILE];
    int64_t base, from, to;
};

/* The queries of a block that read key head `head`, of the heads [from, to). */
struct queries {
    int64_t first, count;
};

static inline struct queries queries_of(const struct block *b, struct layout at, int64_t head, int64_t from,
                                        int64_t to) {
    int64_t groups = at.heads / at.kv_heads, first = head * groups, end = first + groups;
    first = first > from ? first : from, end = end < to ? end : to;
    return (struct queries){first * b->count, (end - first) * b->count};
}

/* The heads [from, to) of a block of rows over the keys of one tile. `dim` repeats the layout's, as a constant where
 * the caller knows it. */
static inline __attribute__((always_inline)) void attend(const struct block *b, const struct scratch *s,
                                                         const struct tile *tile, struct layout at, int64_t dim,
                                                         int64_t from, int64_t to) {
    int64_t groups = at.heads / at.kv_heads, first = from / groups, last = (to - 1) / groups + 1;
    const float *const *slots = tile->slots;
    float *scores = s->scores, *mixed = s->mixed;
    /* What each row sees of the tile; behind the last the first again, for queries come head by head. */
    int64_t lows[ROWS + 2], highs[ROWS + 2];
    for (int64_t i = 0, r = 0; i < b->count + 2; i++, r = r + 1 < b->count ? r + 1 : 0) {
        int64_t low = b->lows[r] - tile->base, high = b->highs[r] - tile->base;
        lows[i] = low > 0 ? low : 0, highs[i] = high < TILE ? high : TILE;
    }
    for (int64_t g = first; g < last; g++) {
        struct queries of = queries_of(b, at, g, from, to);
        score_tile(s->queries + of.first * dim, of.count, slots, g * dim, tile->from, tile->to, dim,
                   scores + of.first * WIDE);
    }
    for (int64_t g = first; g < last; g++) {
        struct queries of = queries_of(b, at, g, from, to);
        int64_t values = (at.kv_heads + g) * dim, i = of.first, end = of.first + of.count, r = 0;
        for (int64_t j = i, q = 0; j < end; j++, q = q + 1 < b->count ? q + 1 : 0)
            if (lows[q] < highs[q])
                weigh(scores + j * WIDE + lows[q], highs[q] - lows[q], dim, s->best + j, s->total + j, mixed + j * dim);
        for (; i + 3 <= end; i += 3, r = (r + 3) % b->count)
            mix_tile(scores + i * WIDE, 3, lows + r, highs + r, slots, values, dim, mixed + i * dim);
        if (i + 2 == end) mix_tile(scores + i * WIDE, 2, lows + r, highs + r, slots, values, dim, mixed + i * dim);
        if (i + 1 == end) mix_tile(scores + i * WIDE, 1, lows + r, highs + r, slots, values, dim, mixed + i * dim);
    }
}

static void attend_tile(const struct block *b, const struct scratch *s, const struct tile *tile, struct layout at,
                        int64_t from, int64_t to) {
#define CASE(D) \
    case D: attend(b, s, tile, at, D, from, to); return;
    switch (at.dim) { CASE(16) CASE(32) CASE(64) CASE(128) }
    attend(b, s, tile, at, at.dim, from, to);
}

void write_rows(const float *k, const float *v, const struct places *where, struct layout at, int64_t first, int64_t n,
                float *cache) {
    int64_t size = at.kv_heads * at.dim;
    for (int64_t i = first; i < first + n; i++, k += size, v += size) {
        int64_t p = where->positions[i], page = where->table[where->rows[i] * where->table_stride + p / at.page];
        float *slot = cache + (page * at.page + p % at.page) * 2 * size;
        for (int64_t h = 0; h < at.kv_heads; h++)
            turn(k + h * at.dim, where->turns + p * at.dim, slot + h * at.dim, at.dim, 1);
        memcpy(slot + size, v, sizeof(float) * size);
    }
}

/* The rows from `first` on, before `stop`, that attend together: of one request, in blocks of about the same size. None
 * where there is none. */
static struct block take(const struct places *where, int64_t first, int64_t stop) {
    struct block b = {.first = first};
    int64_t end = first, most;
    while (end < stop && end - first < 2 * ROWS && where->rows[end] == where->rows[first]) end++;
    most = end - first <= ROWS ? ROWS : (end - first + 1) / 2;
    for (int64_t i = first; i < end && b.count < most; i++) {
        int64_t low = low_of(where, i), high = where->highs[i];
        if (i == first) b.low = low, b.high = high;
        else if (low >= b.high || high <= b.low) break;
        b.low = low < b.low ? low : b.low, b.high = high > b.high ? high : b.high;
        b.lows[b.count] = low, b.highs[b.count++] = high;
    }
    return b;
}

/* The tile of a block that begins with `base`. */
static void find(const float *cache, const struct places *where, struct layout at, const struct block *b,
                 int64_t base, struct tile *tile) {
    const int32_t *pages = where->table + where->rows[b->first] * where->table_stride;
    int64_t stride = 2 * at.kv_heads * at.dim;
    int64_t from = base > b->low ? base : b->low, to = base + TILE < b->high ? base + TILE : b->high;
    tile->base = base, tile->from = from - base, tile->to = to - base;
    for (int64_t p = from; p < to;) {
        const float *slot = cache + ((int64_t)pages[p / at.page] * at.page + p % at.page) * stride;
        int64_t stop = (p / at.page + 1) * at.page;
        for (stop = stop < to ? stop : to; p < stop; p++, slot += stride) tile->slots[p - base] = slot;
    }
}

/* The heads [from, to) of rows [first, first + n) attend; q and out begin with the first of them. Returns 0, or 1 when
 * memory ran out. */
static int attend_heads(const float *q, const float *cache, const struct places *where, struct layout at, int64_t first,
                        int64_t n, int64_t from, int64_t to, float *out) {
    int64_t most = n < ROWS ? n : ROWS, dim = at.dim, size = at.heads * dim, stop = first + n;
    float *queries = malloc(sizeof(float) * most * at.heads * (size_t)(2 * dim + 2 + WIDE));
    if (!queries) return 1;
    float *mixed = queries + most * size, *best = mixed + most * size, *total = best + most * at.heads;
    struct scratch s = {queries, mixed, best, total, total + most * at.heads};
    float scale = 1.0f / sqrtf((float)dim);
    for (struct block b = take(where, first, stop); b.count; b = take(where, b.first + b.count, stop)) {
        for (int64_t r = 0; r < b.count; r++) {
            const float *turns = where->turns + (int64_t)where->positions[b.first + r] * dim;
            for (int64_t h = from; h < to; h++)
                turn(q + (b.first - first + r) * size + h * dim, turns, queries + (h * b.count + r) * dim, dim, scale);
        }
        for (int64_t i = from * b.count; i < to * b.count; i++) best[i] = -INFINITY, total[i] = 0.0f;
        memset(mixed + from * b.count * dim, 0, sizeof(float) * (to - from) * b.count * dim);
        for (int64_t base = b.low / TILE * TILE; base < b.high; base += TILE) {
            struct tile tile;
            find(cache, where, at, &b, base, &tile);
            attend_tile(&b, &s, &tile, at, from, to);
        }
        for (int64_t r = 0; r < b.count; r++)
            for (int64_t h = from; h < to; h++) {
                float inverse = 1.0f / total[h * b.count + r], *o = out + (b.first - first + r) * size + h * dim;
                for (int64_t d = 0; d < dim; d++) o[d] = mixed[(h * b.count + r) * dim + d] * inverse;
            }
    }
    free(queries);
    return 0;
}

int attend_rows(const float *q, const float *cache, const struct places *where, struct layout at, int64_t first,
                int64_t n, float *out) {
    return attend_heads(q, cache, where, at, first, n, 0, at.heads, out);
}

/* All keys and values are written before any row attends. Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_paged_attention(const float *q, const float *k, const float *v, const struct places *where,
                                   float *cache, int64_t n, int64_t heads, int64_t kv_heads, int64_t dim,
                                   int64_t threads, float *out) {
    struct layout at = layout_of(where, heads, kv_heads, dim);
    int64_t work = 0;
    write_rows(k, v, where, at, 0, n, cache);
    for (int64_t i = 0; i < n; i++) work += where->highs[i] - low_of(where, i);
    /* Waking a second thread costs more than a small pass. */
    if (threads < 2 || work * heads * dim <= 100000) return attend_rows(q, cache, where, at, 0, n, out);
    int failed = 0;
    /* Few rows are shared out by heads, many so that each thread gets several shares. */
    int64_t parts = n < threads ? threads : 1, size = heads * dim, each = (n - 1) / (4 * threads) + 1;
    if (parts > heads) parts = heads;
    if (each > ROWS) each = ROWS;
    int64_t shares = (n - 1) / each + 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
    for (int64_t i = 0; i < shares * parts; i++) {
        int64_t row = i / parts * each, part = i % parts, count = n - row < each ? n - row : each;
        failed |= attend_heads(q + row * size, cache, where, at, row, count, heads * part / parts,
                               heads * (part + 1) / parts, out + row * size);
    }
    return failed;
}
