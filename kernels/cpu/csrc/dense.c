/* The linear maps of a layer on a CPU, fp32, with the norm before and the sum behind them. The mathematics and the
 * shapes stand in dense.py.
 *
 * Every output is one sum over the inputs in their order, whatever rows are computed beside it: so a row's result
 * cannot depend on its batch. Weights lie in panels of PANEL outputs and are read once for up to BLOCK rows. bfloat16
 * is the upper half of a float, so sums over narrow weights have the bits of sums over the same weights in fp32.
 */
#include "dense.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "exp_below.h"
#include "export.h"
#include "vector.h"

/* Stores the first `count` sums of a panel. */
static __attribute__((noinline)) void store_part(const float *sums, struct target to, int64_t row, int64_t column,
                                                 int64_t count) {
    int64_t at = row * to.size + column;
    for (int64_t i = 0; i < count; i++) {
        float sum = sums[i];
        for (int64_t t = 0; t < to.times; t++) sum += to.residual[at + i];
        to.out[at + i] = sum;
    }
}

/* Stores the sums of a panel, from registers where all of it is wanted. */
static inline __attribute__((always_inline)) void store(v8 low, v8 high, struct target to, int64_t row,
                                                        int64_t column) {
    if (to.size - column < PANEL) {
        float sums[PANEL];
        memcpy(sums, &low, sizeof low), memcpy(sums + 8, &high, sizeof high);
        store_part(sums, to, row, column, to.size - column);
        return;
    }
    float *out = to.out + row * to.size + column;
    for (int64_t t = 0; t < to.times; t++) {
        const float *residual = to.residual + row * to.size + column;
        low += load(residual);
        high += load(residual + 8);
    }
    memcpy(out, &low, sizeof low);
    memcpy(out + 8, &high, sizeof high);
}

/* Words of a panel for each input. */
static inline int64_t words(int NARROW) { return NARROW ? PANEL / 2 : PANEL; }

/* The weights of a panel's outputs at w. */
static inline __attribute__((always_inline)) void widen(const float *w, int NARROW, v8 *low, v8 *high) {
    if (NARROW) {
        u8 pairs = (u8)load(w);
        *low = (v8)(pairs << 16), *high = (v8)(pairs & 0xffff0000);
    } else {
        *low = load(w), *high = load(w + 8);
    }
}

/* ROWS rows from `row` on by PANELS panels from `panel` on, whose weights begin at w; ROWS, PANELS and NARROW are
 * constants where this is inlined. */
static inline __attribute__((always_inline)) void tile(const float *x, const float *w, int64_t depth, struct target to,
                                                       int64_t row, int64_t panel, int64_t ROWS, int64_t PANELS,
                                                       int NARROW) {
    v8 sums[12][2];
    x += row * depth;
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROWS * PANELS; i++) sums[i][0] = sums[i][1] = (v8){0};
    for (int64_t k = 0; k < depth; k++) {
        /* The next panel, which the processor foresees only when it is there. */
        if (PANELS == 1 && ROWS == 6) __builtin_prefetch(w + (depth + k) * words(NARROW));
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; p++) {
            v8 low, high;
            widen(w + (p * depth + k) * words(NARROW), NARROW, &low, &high);
#pragma GCC unroll 6
            for (int64_t r = 0; r < ROWS; r++) {
                sums[r * PANELS + p][0] += x[r * depth + k] * low;
                sums[r * PANELS + p][1] += x[r * depth + k] * high;
            }
        }
    }
#pragma GCC unroll 6
    for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; p++)
            store(sums[r * PANELS + p][0], sums[r * PANELS + p][1], to, row + r, (panel + p) * PANEL);
}

/* Few rows take several panels at once: eight sums or more hide the latency of one. */
static inline __attribute__((always_inline)) void map(const float *x, int64_t n, int64_t depth, const float *weights,
                                                      struct target to, int NARROW) {
    int64_t panels = (to.size + PANEL - 1) / PANEL, each = depth * words(NARROW), p = 0;
    if (n == 1)
        for (; p + 4 <= panels; p += 4) tile(x, weights + p * each, depth, to, 0, p, 1, 4, NARROW);
    if (n == 2)
        for (; p + 2 <= panels; p += 2) tile(x, weights + p * each, depth, to, 0, p, 2, 2, NARROW);
    if (n == 3)
        for (; p + 2 <= panels; p += 2) tile(x, weights + p * each, depth, to, 0, p, 3, 2, NARROW);
    for (; p < panels; p++) {
        const float *w = weights + p * each;
        int64_t r = 0;
        for (; r + 6 <= n; r += 6) tile(x, w, depth, to, r, p, 6, 1, NARROW);
        switch (n - r) {
            case 5: tile(x, w, depth, to, r, p, 5, 1, NARROW); break;
            case 4: tile(x, w, depth, to, r, p, 4, 1, NARROW); break;
            case 3: tile(x, w, depth, to, r, p, 3, 1, NARROW); break;
            case 2: tile(x, w, depth, to, r, p, 2, 1, NARROW); break;
            case 1: tile(x, w, depth, to, r, p, 1, 1, NARROW); break;
        }
    }
}

void linear_map(const float *x, int64_t n, int64_t depth, const struct packed *weights, struct target to) {
    if (weights->narrow)
        map(x, n, depth, weights->panels, to, 1);
    else
        map(x, n, depth, weights->panels, to, 0);
}

EXPORT void fastblt_rms_norm(const float *x, int64_t n, int64_t size, const float *gain, float eps, float *out) {
    for (int64_t row = 0; row < n; row++, x += size, out += size) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / (float)size + eps);
        for (int64_t i = 0; i < size; i++) out[i] = gain[i] * (x[i] * scale);
    }
}

/* gate = silu(gate) * up */
static void gated(float *gate, const float *up, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float g = gate[i], e = exp_below(g < 0.0f ? g : -g);
        float sigmoid = (g < 0.0f ? e : 1.0f) / (1.0f + e);
        gate[i] = g * sigmoid * up[i];
    }
}

EXPORT int fastblt_project(const float *x, int64_t n, int64_t depth, const float *gain, float eps,
                           const struct linear *maps, int64_t count) {
    float *scratch = NULL;
    if (gain && !(scratch = malloc(sizeof(float) * BLOCK * depth))) return 1;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t some = n - first < BLOCK ? n - first : BLOCK;
        const float *rows = x + first * depth;
        if (gain) {
            fastblt_rms_norm(rows, some, depth, gain, eps, scratch);
            rows = scratch;
        }
        for (const struct linear *to = maps; to < maps + count; to++)
            linear_map(rows, some, depth, to->weights,
                       (struct target){.out = to->out + first * to->outputs, .size = to->outputs});
    }
    free(scratch);
    return 0;
}

EXPORT void fastblt_project_add(const float *x, int64_t n, int64_t depth, const struct packed *w, int64_t size,
                                const float *residual, int64_t times, float *out) {
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t count = n - first < BLOCK ? n - first : BLOCK;
        int64_t at = first * size;
        struct target to = {.out = out + at, .residual = residual + at, .size = size, .times = times};
        linear_map(x + first * depth, count, depth, w, to);
    }
}

EXPORT int fastblt_feed_forward(const float *x, int64_t n, int64_t depth, const float *gain, float eps,
                                const struct packed *gate, const struct packed *up, int64_t inner,
                                const struct packed *down, float *out) {
    int64_t rows = n < BLOCK ? n : BLOCK;
    float *normed = malloc(sizeof(float) * rows * (depth + 2 * inner));
    if (!normed) return 1;
    float *gates = normed + rows * depth, *ups = gates + rows * inner;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t count = n - first < BLOCK ? n - first : BLOCK;
        struct target to = {.out = out + first * depth, .residual = x + first * depth, .size = depth, .times = 1};
        fastblt_rms_norm(x + first * depth, count, depth, gain, eps, normed);
        linear_map(normed, count, depth, gate, (struct target){.out = gates, .size = inner});
        linear_map(normed, count, depth, up, (struct target){.out = ups, .size = inner});
        gated(gates, ups, count * inner);
        linear_map(gates, count, inner, down, to);
    }
    free(normed);
    return 0;
}
