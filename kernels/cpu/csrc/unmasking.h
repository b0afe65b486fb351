/* The rules by which a step of unmasking picks positions: unmasking.py has the mathematics. */
#pragma once
#include <stdint.h>

enum { BY_CONFIDENCE, BY_ENTROPY, EXCLUSIVE_MAX, ONE_STEP };

/* Which of `count` masked positions a step fixes. NaN of a bad row comes last. */
void fastblt_pick(int32_t rule, float bound, const float *confidences, const float *entropies, int64_t count,
                  uint8_t *picked);
