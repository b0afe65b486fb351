/* The choice of bytes within a call that goes on with them, by selection.c and without penalties. */
#pragma once
#include <stdint.h>

#include "dense.h"

/* How requests' bytes are chosen: `head` makes logits [.., vocabulary] of a row; then a value of each parameter for
 * every state row, as in choice.py. Without `temperature` every row is greedy, without `top_k` none truncates.
 * `texts` are the requests' ids, a line of `stride` each. */
struct choice {
    const struct packed *head;
    const float *temperature;
    const int64_t *top_k;
    const float *top_p, *min_p;
    const int64_t *seeds, *eos_from;
    int64_t *texts, stride, vocabulary, eos;
};

/* Rows whose bytes are chosen: logits [n, vocabulary], their state rows, and where the bytes will stand. `allowed` has
 * a mask [vocabulary] for each row, 0 for ids that it may not get, or NULL if it may get all; without it all rows may. */
struct choosers {
    const float *logits;
    const int32_t *owners;
    const int64_t *positions;
    const uint8_t *const *allowed;
    int64_t n;
};

/* Chooses their bytes, and gives confidences and entropies where these are not NULL. */
void choose_rows(const struct choice *by, const struct choosers *rows, int64_t *ids, float *confidences,
                 float *entropies, uint8_t *bad);
