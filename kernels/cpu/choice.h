/* The choice of bytes within a call that goes on with them, by `fastblt_select`: without penalties, row by row. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Rows that are handed on at a time. */
#define CHOSEN 16

/* By state row; without `temperature` every row is greedy, without `top_k` none truncates. `texts` are the requests' ids,
 * each a line of `stride`. */
struct choice {
    void (*select)(const float *, int64_t, const float *, const int64_t *, const float *, const float *, const int64_t *,
                   const int64_t *, const uint8_t *, const float *, const float *, const float *, const int32_t *,
                   const uint8_t *, const float *, const uint8_t *, int64_t *, float *, float *, float *, uint8_t *,
                   int64_t, int64_t);
    const float *head, *temperature;
    const int64_t *top_k;
    const float *top_p, *min_p;
    const int64_t *seeds, *eos_from;
    int64_t *texts, stride, vocabulary, eos;
};

/* Chooses the bytes of rows from their logits [n, vocabulary], and where asked for their confidences and entropies;
 * `positions` are where the bytes will stand. */
static void choose_rows(const struct choice *by, const float *logits, const int32_t *owners, const int64_t *positions,
                   int64_t n, int64_t *ids, float *confidences, float *entropies, uint8_t *bad) {
    int drawn = by->temperature != NULL, cut = by->top_k != NULL;
    for (int64_t first = 0; first < n; first += CHOSEN) {
        float temperature[CHOSEN], top_p[CHOSEN], min_p[CHOSEN], logprobs[CHOSEN];
        int64_t top_k[CHOSEN], seeds[CHOSEN], count = n - first < CHOSEN ? n - first : CHOSEN;
        uint8_t forbid_eos[CHOSEN];
        for (int64_t j = 0; j < count; j++) {
            int32_t owner = owners[first + j];
            forbid_eos[j] = positions[first + j] < by->eos_from[owner];
            if (drawn) temperature[j] = by->temperature[owner], seeds[j] = by->seeds[owner];
            if (cut) top_k[j] = by->top_k[owner], top_p[j] = by->top_p[owner], min_p[j] = by->min_p[owner];
        }
        by->select(logits + first * by->vocabulary, by->vocabulary, drawn ? temperature : NULL, cut ? top_k : NULL,
                   cut ? top_p : NULL, cut ? min_p : NULL, drawn ? seeds : NULL, positions + first, forbid_eos, NULL,
                   NULL, NULL, NULL, NULL, NULL, NULL, ids + first, logprobs, confidences ? confidences + first : NULL,
                   entropies ? entropies + first : NULL, bad + first, count, 1);
    }
}
