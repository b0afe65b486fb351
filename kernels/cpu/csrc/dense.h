/* The linear maps of a layer, its norms and its feed-forward: dense.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

/* Outputs that lie together in packed weights; PANEL in dense.py. */
#define PANEL 16
/* Rows whose inputs and intermediate results stay in the cache together. */
#define BLOCK 48

/* Packed weights [panel][input][PANEL], as floats or, where they are `narrow`, bfloat16: words of two, with output i of
 * the panel in the lower half of word i, and output i + PANEL / 2 in its upper half. */
struct packed {
    const void *panels;
    int64_t narrow;
};

/* Where the outputs of a linear map go, rows of `size`; `times` (0, 1 or 2) times a row of `residual` is added. */
struct target {
    float *out;
    const float *residual;
    int64_t size, times;
};

/* One of several linear maps of the same rows: its weights, and where its rows of `outputs` go. */
struct linear {
    const struct packed *weights;
    int64_t outputs;
    float *out;
};

/* n rows x [n, depth] through weights. */
void linear_map(const float *x, int64_t n, int64_t depth, const struct packed *weights, struct target to);

/* out = gain * (x / sqrt(mean(x^2) + eps)) of n rows; out may be x. */
void fastblt_rms_norm(const float *x, int64_t n, int64_t size, const float *gain, float eps, float *out);

/* `count` maps of the same rows x [n, depth], normed before where there is a gain. Returns 0, or 1 when memory ran
 * out. */
int fastblt_project(const float *x, int64_t n, int64_t depth, const float *gain, float eps, const struct linear *maps,
                    int64_t count);

/* out = x W + times * residual; out may be the residual. */
void fastblt_project_add(const float *x, int64_t n, int64_t depth, const struct packed *w, int64_t size,
                         const float *residual, int64_t times, float *out);

/* out = x + down(silu(gate(norm(x))) * up(norm(x))); out may be x. Returns 0, or 1 when memory ran out. */
int fastblt_feed_forward(const float *x, int64_t n, int64_t depth, const float *gain, float eps,
                         const struct packed *gate, const struct packed *up, int64_t inner, const struct packed *down,
                         float *out);
