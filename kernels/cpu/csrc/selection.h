/* The choice of one id for each row of logits: selection.py has the mathematics and the shapes. */
#pragma once
#include <stdint.h>

/* What rows are chosen by: a line of 260 logits each, `stride` numbers after the last, and a value of each parameter. A
 * parameter that no row needs is NULL; without `temperature` every row is greedy. */
struct columns {
    const float *logits;
    int64_t stride;
    const float *temperature;
    const int64_t *top_k;
    const float *top_p, *min_p;
    const int64_t *seeds, *positions;
    const uint8_t *forbid_eos;
    const float *repetition, *presence, *frequency;
    const int32_t *counts;
    const uint8_t *prompt_seen;
    const float *bias;
    const uint8_t *allowed;
};

/* Why nothing can be chosen from a row, as in kernels/types.py: its logits, or what the parameters made of them. */
enum { NOT_FINITE = 1, NOTHING_LEFT = 2 };

/* Where the results of rows go. `bad` is 0, or why there is none. Confidences and entropies are NULL where nobody asks for them. */
struct selection {
    int64_t *ids;
    float *logprobs, *confidences, *entropies;
    uint8_t *bad;
};

void fastblt_select(const struct columns *of, const struct selection *to, int64_t n, int64_t threads);
