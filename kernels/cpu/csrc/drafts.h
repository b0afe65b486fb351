/* Drafts that a call makes within itself: behind verifications (follow.c), and filtered ones (filtered.c). */
#pragma once
#include "decoder_steps.h"

/* Drafts of a group, all made in one way. */
struct drafts {
    int64_t n;
    int32_t request[GROUP];
    int32_t owners[GROUP];
    int32_t starts[GROUP];  /* the position of the pending byte, the first row */
    int32_t sizes[GROUP];   /* how many bytes are drafted */
    int32_t latents[GROUP]; /* the slot that all rows read */
    int32_t rules[GROUP];
    int32_t lasts[GROUP];
    int32_t mosts[GROUP];
    int32_t untils[GROUP];
    int32_t ones[GROUP];
    int32_t filtered[GROUP]; /* most bytes of a block that the decoder filters, 0: drafts are not filtered */
    int32_t reads[2 * GROUP];
    float bounds[GROUP];
};

/* The lines of `made` from `line` on. */
static inline struct made lines_from(struct made made, int64_t line) {
    made.ids += line * made.width;
    made.fixed += line * made.width;
    made.steps += line;
    made.bad += line;
    made.entropies += line * made.longest;
    return made;
}

/* How a byte of a filtered draft was made, in `fixed`: by a causal row alone, or proposed by a block and kept by the filter,
 * or by the filter's own row in place of another or behind the block. */
enum { ALONE = 1, PASSED, CORRECTED };

/* Drafts of blocks that the decoder's causal rows filter, to their whole length, into the lines of `drafts` from `line` on;
 * their `steps` are all passes of the decoder. Returns 0, or 1 when memory ran out. */
int draft_filtered(const struct task *t, const struct drafts *these, int64_t line);
