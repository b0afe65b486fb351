/* What decoder_steps.c takes and gives (decoder_steps.py has the meaning and the shapes), and what its parts share. */
#pragma once
#include <stdint.h>

#include "single_rows.h"

/* Requests that a thread takes through their passes together: few enough for nobody to wait long for another's. */
#define GROUP 4

/* The columns of what is asked for, a number of each for every request, columns one behind another; as in
 * decoder_steps.py. */
enum {
    OWNERS,  /* its state row */
    STARTS,  /* the position of its first causal row */
    CAUSALS, /* how many causal rows it has */
    SELECTS, /* how many of the last of these give a byte */
    SIZES,   /* how many rows its block has, 0: none */
    LATENTS, /* the slot of the latent that the block reads */
    RUNS,    /* how many runs of causal rows read a latent each */
    RULES,   /* how a step picks masked positions (unmasking.h), or SINGLE_ROWS */
    LASTS,   /* the step that fills what is left, 0: none does */
    MOSTS,   /* most steps */
    ENCODED, /* the position before which its text has been through the encoder */
    SCANNED, /* the position before which its text has been through the entropy model */
    UNTILS,  /* the position before which it shall have been through both, if nothing is masked */
    FOLLOWS, /* how long a draft behind its verification may be, 0: there is none */
    LEFTS,   /* how many bytes its text may still get */
    FILTERED, /* most bytes of a block of that draft which the decoder filters, 0: it does not */
    COLUMNS
};

/* The rule of a draft behind a verification that is no block. */
enum { SINGLE_ROWS = -1 };

/* What becomes of blocks and drafts, a line for each. */
struct made {
    int64_t *ids;     /* [lines, width] */
    int32_t *fixed;   /* [lines, width], the steps that fixed them */
    int32_t *steps;   /* how many steps there were */
    uint8_t *bad;     /* why a row had no finite choice, as in selection.h; 0: each had one */
    float *entropies; /* [lines, longest], of what was scanned */
    int64_t width, longest;
};

/* A call of `count` requests. */
struct call {
    const int32_t *asked;   /* the columns, then all runs (the position behind it, a slot), then all blocks' ids */
    const float *bounds;    /* of the rules, by request */
    const uint8_t *allowed; /* [count, selected, vocabulary], 0 for ids that a selected row may not give; NULL: none */
    int64_t *chosen;        /* [count, selected], the bytes of rows that give one */
    int32_t *accepted;      /* how many of the bytes that stood in their place these agree with */
    int32_t *lines;         /* the line in `drafts` of the draft behind each, -1: there is none */
    struct made made;       /* the requests' blocks */
    struct made drafts;     /* without a width nobody may draft */
    int64_t count;
    int64_t runs;           /* of all requests together */
    int64_t selected;
    int64_t mask;           /* the id of what is masked */
    int64_t encoder_input;  /* whether causal rows begin as encoder states, else as ids */
};

/* A call, or the drafts behind it, column by column. */
struct plans {
    int64_t count;
    const int32_t *owners;
    const int32_t *starts;
    const int32_t *causals;
    const int32_t *selects;
    const int32_t *sizes;
    const int32_t *latents;
    const int32_t *runs;
    const int32_t *rules;
    const int32_t *lasts;
    const int32_t *mosts;
    const int32_t *encoded;
    const int32_t *scanned;
    const int32_t *untils;
    const int32_t *follows;
    const int32_t *lefts;
    const int32_t *filtered;
    const float *bounds;
    const uint8_t *allowed;
    const int32_t *reads;  /* [all runs, 2] */
    const int32_t *blocks; /* [all sizes] */
    int64_t mask, encoder_input;

    /* What becomes of them, as in `call`. */
    int64_t *chosen;
    int64_t selected;
    int32_t *accepted;
    int32_t *lines;
    struct made made;
    struct made drafts;
};

/* The position behind a request's causal rows, where its block begins. */
static inline int32_t end_of(const struct plans *of, int64_t r) { return of->starts[r] + of->causals[r]; }

/* A thread's room for the rows of a group. */
struct room {
    /* By row of a pass. */
    int32_t *owners, *positions, *firsts, *highs, *latents, *block;
    float *x;
    /* By row that gives a byte. */
    int32_t *choosers;
    const uint8_t **masks;
    int64_t *targets, *ids;
    float *states, *logits, *confidences, *entropies;
    uint8_t *bad;
    /* For drafts of single rows. */
    struct row_room single;
};

/* A thread's share of a call: requests whose passes `threads` share, where it has room, and what it spends. */
struct task {
    const struct context *with;
    const struct plans *of;
    const struct room *room;
    int64_t threads;
    struct spent *spent;
};

/* Requests [first, first + n), at most GROUP, to the end of their steps. Returns 0, or 1 when memory ran out. */
int block_steps(const struct task *t, int64_t first, int64_t n);

/* The drafts behind verifications of requests [first, first + n): over the byte behind what was accepted, on the latent
 * that the last accepted row read; and those of requests that have no row, over the byte where they start. Their lines in `drafts` begin at `first`. Returns 0, or 1 when memory ran out. */
int follow(const struct task *t, int64_t first, int64_t n);
