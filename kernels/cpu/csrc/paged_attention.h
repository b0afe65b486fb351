/* Self-attention over paged caches: paged_attention.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

/* Where the rows of a pass stand, and the cosines and sines that turn them. A window of 0 is none. */
struct places {
    const float *turns;
    const int32_t *table, *rows, *positions, *firsts, *highs;
    int64_t window, table_stride, page;
};

/* The shape of a cache. */
struct layout {
    int64_t heads, kv_heads, dim, page;
};

/* Where the range of a row begins. */
static inline int64_t low_of(const struct places *where, int64_t row) {
    int64_t low = where->firsts[row] - where->window + 1;
    return where->window && low > 0 ? low : 0;
}

static inline struct layout layout_of(const struct places *where, int64_t heads, int64_t kv_heads, int64_t dim) {
    return (struct layout){.heads = heads, .kv_heads = kv_heads, .dim = dim, .page = where->page};
}

/* Writes the keys, rotated, and values of rows [first, first + n); k and v begin with the first of them. */
void write_rows(const float *k, const float *v, const struct places *where, struct layout at, int64_t first, int64_t n,
                float *cache);

/* Rows [first, first + n) attend to what is written; q and out begin with the first of them. Returns 0, or 1 when
 * memory ran out. */
int attend_rows(const float *q, const float *cache, const struct places *where, struct layout at, int64_t first,
                int64_t n, float *out);
