/* The decoder's cross-attention: latent_attention.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

/* Row i attends to the `keys` keys of the latent in slot slots[i]; `store` is where the first slot has this layer's.
 * Returns 0, or 1 where a latent has more keys than this was written for. */
int fastblt_latent_attention(const float *q, const float *store, const int32_t *slots, int64_t slot_size, int64_t n,
                             int64_t heads, int64_t kv_heads, int64_t dim, int64_t keys, int64_t threads, float *out);
