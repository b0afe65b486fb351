/* y = x W^T on a CPU, fp32, for weights that do not fit the caches and may be stored narrower. linear.py has the layout.
 *
 * A panel of weights is read once, as one stream, for as many rows as registers have sums for. For more rows a part of
 * it is widened once, into the cache, while the next part is fetched. An output is one sum over the inputs in their
 * order, whatever is computed beside it and however its weights are stored: a row's result cannot depend on its batch.
 */
#include <stdlib.h>

#include "export.h"
#include "narrow.h"
#include "team.h"

/* Inputs whose widened weights are kept in the cache, and tiles that use them there. */
#define DEPTH 128
#define TILES 20
/* Numbers that one thread lays sooner than two. */
#define SMALL 8192
/* How far ahead of its use a stream is fetched: processors stop at the end of a page. */
#define AHEAD 8192

/* What a tile reads and writes: x [depth][rows] times weights, added to sums [rows][WIDTH]. Every input fetches `step`
 * bytes from `next` on, which are read soon. `wide` takes the widened weights, for the tiles that follow. */
struct part {
    const float *x;
    const void *weights;
    int64_t depth;
    const char *next;
    int64_t step;
    float *sums, *wide;
};

/* ROWS rows; PARTS of the pairs of vectors from `half` on. All in capitals are constants where this is inlined. */
static inline __attribute__((always_inline)) void multiply(const struct part *of, int64_t half, int TYPE, int KEEP,
                                                           int64_t ROWS, int64_t PARTS) {
    vf low[12], high[12];
    const float *x = of->x;
    const char *next = of->next;
    int64_t step = of->step;
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROWS * PARTS; i++) {
        const float *at = of->sums + i / PARTS * WIDTH + (half + i % PARTS) * LANES;
        low[i] = read_floats(at), high[i] = read_floats(at + 16);
    }
    for (int64_t k = 0; k < of->depth; k++, x += ROWS, next += step) {
        if (!half) __builtin_prefetch(next);
        if (!half && TYPE == FLOAT32) __builtin_prefetch(next + 64);
#pragma GCC unroll 2
        for (int64_t p = 0; p < PARTS; p++) {
            vf a, b;
            widen(of->weights, k, half + p, TYPE, &a, &b);
            if (KEEP) {
                float *at = of->wide + k * WIDTH + (half + p) * LANES;
                memcpy(at, &a, sizeof a), memcpy(at + 16, &b, sizeof b);
            }
#pragma GCC unroll 12
            for (int64_t r = 0; r < ROWS; r++) {
                low[r * PARTS + p] += x[r] * a;
                high[r * PARTS + p] += x[r] * b;
            }
        }
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROWS * PARTS; i++) {
        float *at = of->sums + i / PARTS * WIDTH + (half + i % PARTS) * LANES;
        memcpy(at, &low[i], sizeof(vf)), memcpy(at + 16, &high[i], sizeof(vf));
    }
}

/* ROWS rows by all outputs of a panel: few rows have registers for them at once. */
static inline __attribute__((always_inline)) void tile(const struct part *of, int TYPE, int KEEP, int64_t ROWS) {
    if (HALVES == 1 || ROWS <= 3) {
        multiply(of, 0, TYPE, KEEP, ROWS, HALVES);
    } else {
        multiply(of, 0, TYPE, KEEP, ROWS, 1);
        multiply(of, 1, TYPE, KEEP, ROWS, 1);
    }
}

static inline __attribute__((always_inline)) void tile_of(const struct part *of, int64_t rows, int TYPE, int KEEP) {
#define ROWS(count) \
    case count: tile(of, TYPE, KEEP, count); break;
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if MOST_ROWS == 12
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
    }
#undef ROWS
}

static __attribute__((noinline)) void tile_float32(const struct part *of, int64_t rows) {
    tile_of(of, rows, FLOAT32, 0);
}

static __attribute__((noinline)) void tile_bfloat16(const struct part *of, int64_t rows) {
    if (of->wide) tile_of(of, rows, BFLOAT16, 1);
    else tile_of(of, rows, BFLOAT16, 0);
}

static __attribute__((noinline)) void tile_float16(const struct part *of, int64_t rows) {
    if (of->wide) tile_of(of, rows, FLOAT16, 1);
    else tile_of(of, rows, FLOAT16, 0);
}

static void tile_as(const struct part *of, int64_t rows, int64_t type) {
    if (type == BFLOAT16) tile_bfloat16(of, rows);
    else if (type == FLOAT16) tile_float16(of, rows);
    else tile_float32(of, rows);
}

/* All rows by one panel: outputs from `column` on. x is cut into tiles, [tile][depth][rows]. */
static void one_panel(const float *x, int64_t n, int64_t depth, const char *panel, int64_t type, float *y, int64_t size,
                      int64_t column) {
    float sums[TILES * MOST_ROWS * WIDTH] __attribute__((aligned(64)));
    float wide[DEPTH * WIDTH] __attribute__((aligned(64)));
    int64_t tiles = tiles_of(n), count = size - column < WIDTH ? size - column : WIDTH;
    int64_t bytes = WIDTH * (type == FLOAT32 ? 4 : 2);
    for (int64_t t = 0; t < tiles; t += TILES) {
        int64_t until = t + TILES < tiles ? t + TILES : tiles, first = tile_start(n, tiles, t);
        int64_t rows = tile_start(n, tiles, until) - first;
        memset(sums, 0, sizeof(float) * rows * WIDTH);
        if (until - t == 1)
            tile_as(&(struct part){x + first * depth, panel, depth, panel + AHEAD, bytes, sums, NULL}, rows, type);
        for (int64_t k = 0; k < depth && until - t > 1; k += DEPTH) {
            int64_t part = depth - k < DEPTH ? depth - k : DEPTH;
            const char *weights = panel + k * bytes, *next = weights + part * bytes;
            for (int64_t i = t; i < until; i++) {
                int64_t from = tile_start(n, tiles, i), own = tile_start(n, tiles, i + 1) - from;
                struct part of = {x + from * depth + k * own, weights, part, next, bytes, NULL, NULL};
                of.sums = sums + (from - first) * WIDTH;
                of.wide = type == FLOAT32 ? NULL : wide;
                if (i == t || type == FLOAT32) {
                    tile_as(&of, own, type);
                } else {
                    of.weights = wide;
                    tile_float32(&of, own);
                }
            }
        }
        for (int64_t r = 0; r < rows; r++)
            memcpy(y + (first + r) * size + column, sums + r * WIDTH, sizeof(float) * count);
    }
}

/* Rows [n, depth] as tiles [tile][depth][rows]: then a tile's numbers come from one place, and not from as many as it
 * has rows, which a cache may have no room for beside each other. */
static void lay_tiles(const float *x, int64_t n, int64_t depth, int64_t tiles, int64_t from, int64_t until, float *out) {
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = tile_start(n, tiles, t), rows = tile_start(n, tiles, t + 1) - first;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = from; k < until; k++) out[first * depth + k * rows + r] = x[(first + r) * depth + k];
    }
}

/* A call: rows x as they came, and `laid` as tiles. */
struct call {
    const float *x;
    float *laid;
    int64_t n, depth, type, size;
    const char *weights;
    float *y;
};

static void lay_part(void *with, int64_t part, int64_t parts) {
    const struct call *c = with;
    lay_tiles(c->x, c->n, c->depth, tiles_of(c->n), c->depth * part / parts, c->depth * (part + 1) / parts, c->laid);
}

static void multiply_part(void *with, int64_t part, int64_t parts) {
    const struct call *c = with;
    int64_t panels = (c->size + WIDTH - 1) / WIDTH, bytes = c->depth * WIDTH * (c->type == FLOAT32 ? 4 : 2);
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; p++)
        one_panel(c->laid, c->n, c->depth, c->weights + p * bytes, c->type, c->y, c->size, p * WIDTH);
}

/* Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_linear(const float *x, int64_t n, int64_t depth, const void *weights, int64_t type, int64_t size,
                          int64_t threads, float *y) {
    if (!n) return 0;
    float *laid = n > 1 ? malloc(sizeof(float) * n * depth) : (float *)x;
    if (!laid) return 1;
    struct call call = {x, laid, n, depth, type, size, weights, y};
    if (n > 1) share(lay_part, &call, n * depth < SMALL ? 1 : threads);
    share(multiply_part, &call, threads);
    if (n > 1) free(laid);
    return 0;
}

/* Rows [first, first + rows) of W [size, depth], as one panel. Rows that are not there are zeros. */
static void pack_panel(const void *from, int64_t type, int64_t first, int64_t size, int64_t depth, void *to) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < WIDTH; i++) {
            /* Two runs of sixteen beside each other, or in turns. */
            int64_t row = first + (type == BFLOAT16 ? i / 2 + i % 2 * 16 : i), at = row * depth + k;
            if (type == FLOAT32)
                ((float *)to)[k * WIDTH + i] = row < size ? ((const float *)from)[at] : 0.0f;
            else
                ((uint16_t *)to)[k * WIDTH + i] = row < size ? ((const uint16_t *)from)[at] : 0;
        }
}

EXPORT void fastblt_pack(const void *weights, int64_t type, int64_t size, int64_t depth, int64_t threads, void *to) {
    int64_t panels = (size + WIDTH - 1) / WIDTH, bytes = depth * WIDTH * (type == FLOAT32 ? 4 : 2);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t p = 0; p < panels; p++) pack_panel(weights, type, p * WIDTH, size, depth, (char *)to + p * bytes);
}
