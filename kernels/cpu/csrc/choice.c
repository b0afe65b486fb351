/* The choice of bytes within a call that goes on with them. Parameters are gathered for some rows at a time. */
#include "choice.h"

#include <stddef.h>
#include <string.h>

#include "selection.h"

/* Rows that are handed on at a time. */
#define SOME 16

void choose_rows(const struct choice *by, const struct choosers *rows, int64_t *ids, float *confidences,
                 float *entropies, uint8_t *bad) {
    int drawn = by->temperature != NULL, cut = by->top_k != NULL;
    int64_t vocabulary = by->vocabulary;
    uint8_t allowed[rows->allowed ? SOME * vocabulary : 1];
    for (int64_t first = 0; first < rows->n; first += SOME) {
        float temperature[SOME], top_p[SOME], min_p[SOME], logprobs[SOME];
        int64_t top_k[SOME], seeds[SOME], n = rows->n - first < SOME ? rows->n - first : SOME;
        uint8_t forbid_eos[SOME];
        for (int64_t j = 0; j < n; j++) {
            int32_t owner = rows->owners[first + j];
            forbid_eos[j] = rows->positions[first + j] < by->eos_from[owner];
            if (rows->allowed) {
                const uint8_t *mask = rows->allowed[first + j];
                if (mask)
                    memcpy(allowed + j * vocabulary, mask, vocabulary);
                else
                    memset(allowed + j * vocabulary, 1, vocabulary);
            }
            if (drawn) {
                temperature[j] = by->temperature[owner];
                seeds[j] = by->seeds[owner];
            }
            if (cut) {
                top_k[j] = by->top_k[owner];
                top_p[j] = by->top_p[owner];
                min_p[j] = by->min_p[owner];
            }
        }
        struct columns of = {
            .logits = rows->logits + first * vocabulary,
            .stride = vocabulary,
            .temperature = drawn ? temperature : NULL,
            .top_k = cut ? top_k : NULL,
            .top_p = cut ? top_p : NULL,
            .min_p = cut ? min_p : NULL,
            .seeds = drawn ? seeds : NULL,
            .positions = rows->positions + first,
            .forbid_eos = forbid_eos,
            .allowed = rows->allowed ? allowed : NULL,
        };
        struct selection to = {
            .ids = ids + first,
            .logprobs = logprobs,
            .confidences = confidences ? confidences + first : NULL,
            .entropies = entropies ? entropies + first : NULL,
            .bad = bad + first,
        };
        fastblt_select(&of, &to, n, 1);
    }
}
