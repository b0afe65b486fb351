/* y = x W^T for a few rows on a CPU, fp32, where reading W is what costs. The shapes stand in linear.py.
 *
 * W is read once, in the order it lies in, and every row of it meets all rows of x while it is in the cache. An
 * output is one sum over the inputs, eight lanes and then their sum, whatever is computed beside it: so a row's
 * result cannot depend on its batch.
 */
#include <stdint.h>

#include "export.h"
#include "vector.h"

static inline float sum_of(v8 a) {
    float s[8];
    memcpy(s, &a, sizeof s);
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

/* ROWS rows of x by OUTS rows of W; both are constants where this is inlined. */
static inline __attribute__((always_inline)) void tile(const float *x, const float *w, int64_t depth, float *y,
                                                       int64_t size, int64_t ROWS, int64_t OUTS) {
    v8 sums[12];
    int64_t whole = depth / 8 * 8;
    for (int64_t i = 0; i < ROWS * OUTS; i++) sums[i] = (v8){0};
    for (int64_t k = 0; k < whole; k += 8) {
        v8 weights[8];
#pragma GCC unroll 8
        for (int64_t o = 0; o < OUTS; o++) weights[o] = load(w + o * depth + k);
#pragma GCC unroll 4
        for (int64_t r = 0; r < ROWS; r++) {
            v8 row = load(x + r * depth + k);
#pragma GCC unroll 8
            for (int64_t o = 0; o < OUTS; o++) sums[r * OUTS + o] += row * weights[o];
        }
    }
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t o = 0; o < OUTS; o++) {
            float sum = sum_of(sums[r * OUTS + o]);
            for (int64_t k = whole; k < depth; k++) sum += x[r * depth + k] * w[o * depth + k];
            y[r * size + o] = sum;
        }
}

static inline __attribute__((always_inline)) void outputs(const float *x, int64_t n, const float *w, int64_t depth,
                                                          float *y, int64_t size, int64_t OUTS) {
    int64_t r = 0;
    for (; r + 4 <= n; r += 4) tile(x + r * depth, w, depth, y + r * size, size, 4, OUTS);
    switch (n - r) {
        case 3: tile(x + r * depth, w, depth, y + r * size, size, 3, OUTS); break;
        case 2: tile(x + r * depth, w, depth, y + r * size, size, 2, OUTS); break;
        case 1: tile(x + r * depth, w, depth, y + r * size, size, 1, OUTS); break;
    }
}

EXPORT void fastblt_linear(const float *x, int64_t n, int64_t depth, const float *w, int64_t size, int64_t threads,
                           float *y) {
    /* One row has the registers for more outputs, and needs them to hide the latency of its sums. */
    int64_t each = n == 1 ? 8 : 3, groups = size / each;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; g++) {
        int64_t o = g * each;
        if (n == 1)
            tile(x, w + o * depth, depth, y + o, size, 1, 8);
        else
            outputs(x, n, w + o * depth, depth, y + o, size, 3);
    }
    for (int64_t o = groups * each; o < size; o++) outputs(x, n, w + o * depth, depth, y + o, size, 1);
}
