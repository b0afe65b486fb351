/* Weights in the types they are stored in, and how they become the floats that are multiplied. linear.py has the
 * layout.
 *
 * Every type widens exactly, so that sums over narrow weights have the bits of sums over the same weights in fp32.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

/* How weights are stored; STORAGE in linear.py. */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };

/* Outputs that lie together in packed weights. */
#define WIDTH 32

/* The widest vectors of the machine. Outputs of a panel are two runs of sixteen, and `HALVES` pairs of vectors, one of
 * each run, cover them. MOST_ROWS rows have their sums in registers at once. */
#ifdef __AVX512F__
#define LANES 16
#define MOST_ROWS 12
#else
#define LANES 8
#define MOST_ROWS 6
#endif
#define HALVES (16 / LANES)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

static inline vf read_floats(const float *at) {
    vf out;
    memcpy(&out, at, sizeof out);
    return out;
}

/* fp16 as floats. Without an instruction for it the exponent is put right by a product, which is exact too. */
static inline vf read_halves(const uint16_t *at) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    vh narrow;
    memcpy(&narrow, at, sizeof narrow);
    vu bits = __builtin_convertvector(narrow, vu);
    vf size = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)size | (bits & 0x8000) << 16);
#endif
}

/* One number of sixteen bits as a float. */
static inline float widen_one(uint16_t number, int64_t type) {
    uint32_t bits = type == BFLOAT16 ? (uint32_t)number << 16 : (uint32_t)(number & 0x7fff) << 13;
    float out;
    memcpy(&out, &bits, 4);
    if (type == BFLOAT16) return out;
    out *= 0x1p112f;
    return number & 0x8000 ? -out : out;
}

/* Vectors `half` of both runs of a panel, of input k. bfloat16 are the upper halves of floats: a word has an output of
 * the first run in its lower half, and the one of the second run in its upper half. */
static inline __attribute__((always_inline)) void widen(const void *panel, int64_t k, int64_t half, int TYPE, vf *low,
                                                        vf *high) {
    if (TYPE == FLOAT32) {
        const float *at = (const float *)panel + k * WIDTH + half * LANES;
        *low = read_floats(at), *high = read_floats(at + 16);
    } else if (TYPE == BFLOAT16) {
        vu words;
        memcpy(&words, (const uint32_t *)panel + k * 16 + half * LANES, sizeof words);
        *low = (vf)(words << 16), *high = (vf)(words & 0xffff0000);
    } else {
        const uint16_t *at = (const uint16_t *)panel + k * WIDTH + half * LANES;
        *low = read_halves(at), *high = read_halves(at + 16);
    }
}

/* Rows are cut into tiles of about the same size, at most MOST_ROWS: tile t of so many begins at this row. */
static inline int64_t tiles_of(int64_t n) { return (n + MOST_ROWS - 1) / MOST_ROWS; }
static inline int64_t tile_start(int64_t n, int64_t tiles, int64_t t) { return n * t / tiles; }
