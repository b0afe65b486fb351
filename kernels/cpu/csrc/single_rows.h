/* Single rows of a request one after another, each over the byte that the one before it gave: drafts of BLT-S,
 * patches of BLT. multi_step.py says what a step computes. */
#pragma once
#include <stdint.h>

#include "choice.h"
#include "stack.h"

/* What all requests of a call share: the modules, the latents that decoder rows read, and how bytes are chosen. */
struct context {
    const struct part *parts;
    const struct latents *latents;
    const struct choice *choice;
};

/* Requests in the order of the call: what is asked for each, and what becomes of it. */
struct requests {
    const int32_t *owners;  /* its state row */
    const int32_t *starts;  /* the position of its first decoder row */
    const int32_t *latents; /* the slot of the latent that its rows read */
    const int32_t *limits;  /* how many bytes it gets at most */
    const int32_t *scans;   /* how many of them are scanned at most; of a draft: how many rows, 0 or all */
    const int32_t *opened;  /* where its open patch began; -1: it drafts */
    const int32_t *fresh;   /* whether its first row is still to be encoded */
    int32_t *made;          /* how many bytes it got */
    int32_t *scanned;       /* how many rows were scanned */
    int64_t *ids;           /* [count, most], its bytes */
    float *entropies;       /* [count, most], nats, of what was scanned */
    uint8_t *bad;           /* why a row had no finite choice, as in selection.h; 0: each had one */
    int64_t count, most;
};

/* A patch closes behind a byte of a higher entropy (nats), or of so many bytes (0: any number). With `encoder_input`
 * drafted rows begin as encoder states, else as ids. */
struct rule {
    double threshold;
    int64_t longest, encoder_input;
};

/* A thread's room: for one row its state x, `scratch` and logits; and for `most` rows that go beside the steps their
 * places, and in x their states and entropies. */
struct row_room {
    float *x, *scratch, *logits;
    struct stretch beside;
    int64_t most;
};

/* Floats of a row's `scratch`: what any module takes. */
int64_t scratch_floats(const struct part *parts);

/* Request r to the end of its steps. `threads` share the passes beside them. Returns 0, or 1 when memory ran out. */
int single_rows(const struct context *with, const struct requests *of, const struct rule *rule, int64_t r,
                int64_t threads, const struct row_room *room, struct spent *spent);
