/* Selection on a CPU, fp32: every row alone, in one pass. noise.py has the noise.
 *
 * Scores are made by the operations of the torch path, one rounding each (so this file is compiled without fused
 * multiply-adds): greedy ids are the same. Sums over a row are float64 in a fixed order. Truncation keeps a prefix of
 * the ids in the order (score descending, id ascending), whose end is found bit by bit, as in the Triton kernel: no
 * sort.
 *
 * A drawn id has score + noise above all others. A rough logarithm tells nearly all of them that they have not, and
 * the few that are left are compared by the exact noise: so float64 logarithms are taken for one id or two, not for
 * 260.
 */
#include "selection.h"

#include <math.h>
#include <string.h>

#include "exp_below.h"
#include "export.h"

#define V 260
#define BLOCKS 65
/* Rows and blocks padded to whole vectors. */
#define WIDTH 264
#define BLOCK_WIDTH 72
#define SUMS 16
#define EOS 2
/* More than twice the error of `fastblt_rough_gumbel` and of a sum with it: 1e-5 each. */
#define DOUBT 1e-4f

/* ln x of a positive normal number, to 1e-7 of its value even near 1. */
static inline float rough_log(float x) {
    int32_t bits, exponent;
    memcpy(&bits, &x, sizeof bits);
    exponent = (bits - 0x3f3504f3) >> 23;
    /* A negative number may be multiplied and not shifted. */
    bits -= exponent * (1 << 23);
    float f, e = (float)exponent, y = 7.0376836292e-2f;
    memcpy(&f, &bits, sizeof f);
    f -= 1.0f;
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    float square = f * f;
    return f + (y * f * square - 2.12194440e-4f * e - 0.5f * square) + 0.693359375f * e;
}

/* The Gumbel noise of `count` words, to 1e-5. */
EXPORT void fastblt_rough_gumbel(const uint32_t *words, int64_t count, float *noise) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float u = (float)(int32_t)((words[i] >> 9) * 2 + 1) * 0x1p-24f;
        noise[i] = -rough_log(-rough_log(u));
    }
}

static float exact_gumbel(uint32_t word) { return (float)-log(-log(((word >> 9) + 0.5) * 0x1p-23)); }

/* The Philox words of the 260 ids, and of a few beyond. */
static void draw_words(int64_t seed, int64_t position, uint32_t *restrict words) {
    uint32_t low = (uint32_t)position, high = (uint32_t)((uint64_t)position >> 32);
#pragma omp simd
    for (uint32_t block = 0; block < BLOCK_WIDTH; block++) {
        uint32_t c0 = block, c1 = 0, c2 = low, c3 = high;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t first = (uint64_t)0xD2511F53u * c0, second = (uint64_t)0xCD9E8D57u * c2;
            c0 = (uint32_t)(second >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)second;
            c2 = (uint32_t)(first >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)first;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[4 * block] = c0;
        words[4 * block + 1] = c1;
        words[4 * block + 2] = c2;
        words[4 * block + 3] = c3;
    }
}

static float largest(const float *x) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static int64_t first_of(const float *x, float value) {
    int64_t i = 0;
    while (i < V - 1 && x[i] != value) i++;
    return i;
}

/* e^(x - top) into `out`, and the sum. What lies below 1e-37 counts as 0. */
static double weigh(const float *restrict x, float top, float *restrict out) {
    double total = 0.0;
#pragma omp simd
    for (int64_t i = 0; i < WIDTH; i++) {
        float below = x[i] - top;
        out[i] = below < -86.0f ? 0.0f : exp_below(below);
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < WIDTH; i++) total += out[i];
    return total;
}

static int beyond(const float *x) {
    int beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < WIDTH; i++) beyond |= !(x[i] < INFINITY);
    return beyond;
}

/* Scores after penalties, bias, and what is forbidden; returns why nothing can be chosen from them, or 0: what the
 * logits lack is told apart from what the parameters made of finite ones. */
static int penalize(const struct columns *of, int64_t row, float *restrict scores) {
    const float *logits = of->logits + row * of->stride;
    memcpy(scores, logits, sizeof(float) * V);
    for (int64_t i = V; i < WIDTH; i++) scores[i] = -INFINITY;
    /* Adding keeps NaN visible and turns +inf at a forbidden id into NaN. */
    scores[0] += -INFINITY;
    scores[1] += -INFINITY;
    scores[3] += -INFINITY;
    if (beyond(scores) || largest(scores) == -INFINITY) return NOT_FINITE;
    const int32_t *counts = of->counts ? of->counts + row * V : NULL;
    const uint8_t *prompt = of->prompt_seen ? of->prompt_seen + row * V : NULL;
    if (of->repetition && (counts || prompt)) {
        float rate = of->repetition[row];
        for (int64_t i = 0; i < V; i++) {
            int seen = (prompt && prompt[i]) || (counts && counts[i] > 0);
            float s = scores[i], divided = s / rate, multiplied = s * rate;
            scores[i] = seen ? (s > 0.0f ? divided : multiplied) : s;
        }
    }
    if (counts && (of->frequency || of->presence)) {
        float frequency = of->frequency ? of->frequency[row] : 0.0f, presence = of->presence ? of->presence[row] : 0.0f;
        for (int64_t i = 0; i < V; i++) {
            float spent = (float)counts[i] * frequency + (counts[i] > 0 ? presence : 0.0f);
            scores[i] -= spent;
        }
    }
    if (of->bias)
        for (int64_t i = 0; i < V; i++) scores[i] += of->bias[row * V + i];
    if (of->allowed)
        for (int64_t i = 0; i < V; i++) scores[i] += of->allowed[row * V + i] ? 0.0f : -INFINITY;
    if (of->forbid_eos[row]) scores[EOS] += -INFINITY;
    return beyond(scores) || largest(scores) == -INFINITY ? NOTHING_LEFT : 0;
}

/* Takes the ids that top_k, top_p and min_p remove out of `scores` (-inf); `weights` are e^(score - largest). */
static void truncate_row(float *restrict scores, const float *restrict weights, int64_t top_k, float top_p,
                         float min_p) {
    /* Images ascend as scores descend; zeros of both signs are equal. */
    int32_t images[WIDTH], last = INT32_MAX;
    for (int64_t i = 0; i < WIDTH; i++) {
        float score = scores[i] == 0.0f ? 0.0f : scores[i];
        memcpy(images + i, &score, sizeof score);
        images[i] = ~(images[i] ^ ((images[i] >> 31) & INT32_MAX));
    }
    if (top_k > 0 && top_k < V) {
        /* An id stays while fewer than k scores are greater than its own, so all of a tie at the boundary do. */
        last = INT32_MIN;
        for (int bit = 31; bit >= 0; bit--) {
            int32_t further = (int32_t)((uint32_t)last + (1u << bit)), before = 0;
#pragma omp simd reduction(+ : before)
            for (int64_t i = 0; i < WIDTH; i++) before += images[i] < further;
            if (before < top_k) last = further;
        }
    }
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < WIDTH; i++) total += images[i] <= last ? weights[i] : 0.0f;
    /* Ids lighter than this weigh less than 1 - top_p together: all of them lie behind the end. */
    double light = top_p < 1.0f ? (1.0 - top_p) * total / V : 0.0, reach = top_p * total;
    light = light < min_p ? min_p : light;
    int64_t keys[V + SUMS], end = INT64_MAX, first = INT64_MAX, count = 0;
    double masses[V + SUMS];
    for (int64_t i = 0; i < V; i++) {
        keys[count] = ((int64_t)images[i] + 2147483648) * 512 + i;
        masses[count] = weights[i];
        count += images[i] <= last && weights[i] >= light;
    }
    if (top_p < 1.0f) {
        for (int64_t i = count; i < count + SUMS; i++) keys[i] = INT64_MAX, masses[i] = 0.0;
        for (int64_t i = 0; i < count; i++) first = keys[i] < first ? keys[i] : first;
        /* An id stays while the mass before it is below top_p; the first id always does. */
        end = 0;
        for (int bit = 40; bit >= 0; bit--) {
            int64_t further = end | (int64_t)1 << bit;
            /* As many sums at once as hide an addition's latency. */
            double sums[SUMS] = {0.0}, before = 0.0;
            for (int64_t i = 0; i < count; i += SUMS)
                for (int64_t j = 0; j < SUMS; j++) sums[j] += keys[i + j] < further ? masses[i + j] : 0.0;
            for (int64_t j = 0; j < SUMS; j++) before += sums[j];
            if (before < reach) end = further;
        }
        end = end < first ? first : end;
    }
    float kept[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) kept[i] = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        if (keys[i] <= end) kept[keys[i] % 512] = scores[keys[i] % 512];
    memcpy(scores, kept, sizeof kept);
}

/* argmax(score + noise), the lowest id of equals; the largest score is `top`. */
static int64_t draw(const float *scores, float top, int64_t seed, int64_t position) {
    uint32_t words[4 * BLOCK_WIDTH];
    float noise[WIDTH], rough[WIDTH], best = -INFINITY;
    draw_words(seed, position, words);
    fastblt_rough_gumbel(words, WIDTH, noise);
#pragma omp simd
    for (int64_t i = 0; i < WIDTH; i++) rough[i] = (scores[i] - top) + noise[i];
    float floor = largest(rough) - DOUBT;
    int64_t chosen = 0;
    for (int64_t i = 0; i < V; i++) {
        if (rough[i] < floor) continue;
        float value = (scores[i] - top) + exact_gumbel(words[i]);
        if (value > best) best = value, chosen = i;
    }
    return chosen;
}

static void select_row(const struct columns *of, int64_t row, int64_t *id, float *logprob, float *confidence,
                       float *entropy, uint8_t *bad) {
    float scores[WIDTH], weights[WIDTH];
    int sampled = of->temperature && of->temperature[row] > 0.0f;
    *bad = (uint8_t)penalize(of, row, scores);
    if (*bad) {
        *id = EOS;
        *logprob = NAN;
        if (confidence) *confidence = *entropy = NAN;
        return;
    }
    float top = largest(scores);
    int64_t chosen = first_of(scores, top);
    if (confidence) {
        double total = weigh(scores, top, weights), spent = 0.0;
        /* H = ln Z + sum of e (top - score) / Z; where e is 0 any finite number gives the right product. */
#pragma omp simd reduction(+ : spent)
        for (int64_t i = 0; i < WIDTH; i++) spent += weights[i] * (weights[i] > 0.0f ? top - scores[i] : 0.0f);
        *confidence = (float)(1.0 / total);
        *entropy = (float)(log(total) + spent / total);
    }
    if (sampled) {
        float heat = of->temperature[row];
        /* Quotients beyond fp32 would all be equal: then they are taken of what the scores lack to the largest. */
        float off = fabsf(top / heat) <= 3.402823466e+38f ? 0.0f : top;
        for (int64_t i = 0; i < WIDTH; i++) scores[i] = (scores[i] - off) / heat;
        top = largest(scores);
    }
    int64_t top_k = sampled && of->top_k ? of->top_k[row] : 0;
    float top_p = sampled && of->top_p ? of->top_p[row] : 1.0f, min_p = sampled && of->min_p ? of->min_p[row] : 0.0f;
    int truncated = (top_k > 0 && top_k < V) || top_p < 1.0f || min_p > 0.0f;
    if (truncated) {
        weigh(scores, top, weights);
        truncate_row(scores, weights, top_k, top_p, min_p);
    }
    if (sampled) chosen = draw(scores, top, of->seeds[row], of->positions[row]);
    *id = chosen;
    memcpy(scores, of->logits + row * of->stride, sizeof(float) * V);
    float highest = largest(scores);
    *logprob = (float)((double)scores[chosen] - highest - log(weigh(scores, highest, weights)));
}

EXPORT void fastblt_select(const struct columns *of, const struct selection *to, int64_t n, int64_t threads) {
    /* Waking a second thread costs more than a few rows. */
    int many = threads > 1 && n > 64;
#pragma omp parallel for num_threads(threads) if (many)
    for (int64_t row = 0; row < n; row++)
        select_row(of, row, to->ids + row, to->logprobs + row, to->confidences ? to->confidences + row : NULL,
                   to->entropies ? to->entropies + row : NULL, to->bad + row);
}
