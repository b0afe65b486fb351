/* Byte embeddings plus hashed n-gram embeddings: hash_embedding.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

/* `count` hash tables of `vocab` rows and multipliers [count, width], in a type of narrow.h; rows of all tables have
 * `size` numbers. */
struct tables {
    const int64_t *powers;
    int64_t width, count, vocab;
    const float *bytes;
    const void *hashed;
    int64_t type, size;
};

/* The embedding of the last id of a window of `width` ids. */
void embed(const int64_t *window, const struct tables *of, float *restrict out);
