/* What the calls before and behind the global transformer take: upstream.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

#include "dense.h"
#include "paged_rows.h"

/* Weights that pool a patch: of the maximum of its bytes' states `projection` makes k queries of `size` numbers, which
 * attend to its bytes. */
struct pooling {
    const struct packed *projection;
    const float *query_gain;
    const struct packed *queries;
    const float *key_gain;
    const struct packed *keys, *values, *out;
    float query_eps, key_eps;
    int64_t k, size, heads, kv_heads, dim;
};

/* Bytes [starts[i], ends[i]] of a request each, and where their states are. */
struct patches {
    const float *states;
    struct pages pages;
    const int32_t *owners, *starts, *ends;
};

/* Weights of one of the decoder's cross-attentions: the norm before its keys and values, and their maps. */
struct reader {
    const float *gain;
    const struct packed *keys, *values;
    float eps;
};

/* Where keys and values of latents go: slots of the store [slots, count, 2, k, narrow]. `projection` makes k rows of
 * `size` numbers of a latent. */
struct reading {
    const struct packed *projection;
    const struct reader *readers;
    int64_t k, size, count, narrow;
    const int32_t *slots;
    float *store;
};
