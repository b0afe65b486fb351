/* y = x W^T on a CPU for weights of eight bits. linear.py has the layout.
 *
 * Inputs are cut into groups. In a group every row of x, and every output's weights, are whole numbers from -127 to 127
 * times a scale of their own. So an input that is far larger than others costs precision in its own group only.
 * Products of whole numbers are exact, and a group's are added to the output in the order of groups: a row's result
 * depends neither on its batch nor on the processor.
 */
#include <math.h>
#include <stdlib.h>

#include "export.h"
#include "narrow.h"
#include "team.h"
#include "vector.h"

/* GROUP in linear.py: a group's scales lie before its weights, [GROUP / 4][WIDTH][4]. */
#define GROUP 128
#define GROUP_BYTES (WIDTH * 4 + WIDTH * GROUP)
/* Tiles whose sums are kept in the cache. */
#define TILES 20
/* Numbers that one thread lays sooner than two. */
#define SMALL 8192
/* How far ahead of its use a stream is fetched: processors stop at the end of a page. */
#define AHEAD 8192

/* Where instructions multiply bytes without a sign by such with one, one of both is moved by this, and what that adds is
 * taken away: of several rows x, which adds the sum of weights, and of one row the weights (`one_row`). */
#ifdef __AVX512VNNI__
#define MOVED 128
#else
#define MOVED 0
#endif

#if MOVED
/* What the sums of a group begin with: less what x is moved by, times the weights. */
static inline void begin(const int8_t *weights, int32_t *sums) {
    __m512i low = _mm512_setzero_si512(), high = low, all = _mm512_set1_epi8((char)MOVED);
    for (int64_t k = 0; k < GROUP / 4; k++, weights += WIDTH * 4) {
        low = _mm512_dpbusd_epi32(low, all, _mm512_loadu_si512(weights));
        high = _mm512_dpbusd_epi32(high, all, _mm512_loadu_si512(weights + 64));
    }
    _mm512_storeu_si512(sums, _mm512_sub_epi32(_mm512_setzero_si512(), low));
    _mm512_storeu_si512(sums + 16, _mm512_sub_epi32(_mm512_setzero_si512(), high));
}
#else
static inline void begin(const int8_t *weights, int32_t *sums) { (void)weights, (void)sums; }
#endif

#if MOVED
/* The only row by one panel of `groups`: outputs from `column` on. Its weights are moved as they are read: what that adds is
 * the sum of x, `sums` of every group, for all outputs alike, so weights are read once. Two sums of each output are under
 * way, since the next product waits for the last one's sum. */
static void one_row(const uint8_t *x, const float *scales, const int32_t *sums, int64_t groups, const char *panel, float *y,
                    int64_t count) {
    const __m512i move = _mm512_set1_epi8((char)MOVED);
    vf low = {0}, high = {0};
    for (int64_t g = 0; g < groups; g++, panel += GROUP_BYTES, x += GROUP) {
        const char *weights = panel + WIDTH * 4;
        __m512i a = _mm512_set1_epi32(-MOVED * sums[g]), b = a, c = _mm512_setzero_si512(), d = c;
#pragma GCC unroll 4
        for (int64_t k = 0; k < GROUP; k += 8, weights += WIDTH * 8) {
            int32_t four[2];
            memcpy(four, x + k, 8);
            __m512i first = _mm512_set1_epi32(four[0]), second = _mm512_set1_epi32(four[1]);
            for (int64_t ahead = 0; ahead < 256; ahead += 64) __builtin_prefetch(weights + AHEAD + ahead);
            a = _mm512_dpbusd_epi32(a, _mm512_xor_si512(_mm512_loadu_si512(weights), move), first);
            b = _mm512_dpbusd_epi32(b, _mm512_xor_si512(_mm512_loadu_si512(weights + 64), move), first);
            c = _mm512_dpbusd_epi32(c, _mm512_xor_si512(_mm512_loadu_si512(weights + 128), move), second);
            d = _mm512_dpbusd_epi32(d, _mm512_xor_si512(_mm512_loadu_si512(weights + 192), move), second);
        }
        const float *own = (const float *)panel;
        low += __builtin_convertvector((vi)_mm512_add_epi32(a, c), vf) * read_floats(own) * scales[g];
        high += __builtin_convertvector((vi)_mm512_add_epi32(b, d), vf) * read_floats(own + 16) * scales[g];
    }
    float all[WIDTH];
    memcpy(all, &low, sizeof low), memcpy(all + 16, &high, sizeof high);
    memcpy(y, all, sizeof(float) * count);
}
#endif

/* ROWS rows of a group, x [GROUP / 4][ROWS][4] with a scale each, added to sums [ROWS][WIDTH]. `first` is what `begin`
 * made of the group's weights. */
static inline __attribute__((always_inline)) void multiply(const uint8_t *x, const float *scales, const void *panel,
                                                           const int32_t *first, float *sums, int64_t ROWS) {
    const float *own = panel;
    const int8_t *weights = (const int8_t *)panel + WIDTH * 4;
    (void)first; /* Not wanted where nothing is moved. */
#if MOVED
    vi low[12], high[12];
    memcpy(low, first, sizeof low[0]), memcpy(high, first + 16, sizeof high[0]);
#pragma GCC unroll 12
    for (int64_t r = 1; r < ROWS; r++) low[r] = low[0], high[r] = high[0];
    for (int64_t k = 0; k < GROUP / 4; k++, weights += WIDTH * 4) {
        __builtin_prefetch(weights + AHEAD);
        __builtin_prefetch(weights + AHEAD + 64);
        __m512i a = _mm512_loadu_si512(weights), b = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 12
        for (int64_t r = 0; r < ROWS; r++) {
            int32_t four;
            memcpy(&four, x + (k * ROWS + r) * 4, 4);
            __m512i bytes = _mm512_set1_epi32(four);
            low[r] = (vi)_mm512_dpbusd_epi32((__m512i)low[r], bytes, a);
            high[r] = (vi)_mm512_dpbusd_epi32((__m512i)high[r], bytes, b);
        }
    }
    vf low_scales = read_floats(own), high_scales = read_floats(own + 16);
#pragma GCC unroll 12
    for (int64_t r = 0; r < ROWS; r++) {
        vf a = __builtin_convertvector(low[r], vf) * low_scales, b = __builtin_convertvector(high[r], vf) * high_scales;
        a = read_floats(sums + r * WIDTH) + a * scales[r];
        b = read_floats(sums + r * WIDTH + 16) + b * scales[r];
        memcpy(sums + r * WIDTH, &a, sizeof a), memcpy(sums + r * WIDTH + 16, &b, sizeof b);
    }
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t part = 0; part < WIDTH; part += 8) {
        i8 all[MOST_ROWS];
#pragma GCC unroll 12
        for (int64_t r = 0; r < ROWS; r++) all[r] = (i8){0};
        for (int64_t k = 0; k < GROUP / 4; k++) {
            if (part % 16 == 0) __builtin_prefetch(weights + (k * WIDTH + part) * 4 + AHEAD);
            __m256i a = _mm256_loadu_si256((const __m256i *)(weights + (k * WIDTH + part) * 4));
#pragma GCC unroll 12
            for (int64_t r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, x + (k * ROWS + r) * 4, 4);
                __m256i bytes = _mm256_set1_epi32(four);
                /* The sign goes to the weights: two products of 127 by 127 fit sixteen bits. */
                __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), _mm256_sign_epi8(a, bytes));
                all[r] += (i8)_mm256_madd_epi16(pairs, ones);
            }
        }
        v8 part_scales = load(own + part);
#pragma GCC unroll 12
        for (int64_t r = 0; r < ROWS; r++) {
            v8 a = __builtin_convertvector(all[r], v8) * part_scales;
            a = load(sums + r * WIDTH + part) + a * scales[r];
            memcpy(sums + r * WIDTH + part, &a, sizeof a);
        }
    }
#else
    for (int64_t r = 0; r < ROWS; r++) {
        int32_t all[WIDTH] = {0};
        for (int64_t k = 0; k < GROUP / 4; k++)
            for (int64_t i = 0; i < WIDTH; i++)
                for (int64_t j = 0; j < 4; j++)
                    all[i] += (int8_t)x[(k * ROWS + r) * 4 + j] * weights[(k * WIDTH + i) * 4 + j];
        for (int64_t i = 0; i < WIDTH; i++) sums[r * WIDTH + i] += (float)all[i] * own[i] * scales[r];
    }
#endif
}

static __attribute__((noinline)) void tile(const uint8_t *x, const float *scales, const void *panel,
                                           const int32_t *first, float *sums, int64_t rows) {
#define ROWS(count) \
    case count: multiply(x, scales, panel, first, sums, count); break;
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if MOST_ROWS == 12
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
    }
#undef ROWS
}

/* All rows by one panel of `groups`: outputs from `column` on. x is laid as in `lay`. */
static void one_panel(const uint8_t *x, const float *scales, int64_t n, int64_t groups, const char *panel, float *y,
                      int64_t size, int64_t column) {
    float sums[TILES * MOST_ROWS * WIDTH] __attribute__((aligned(64)));
    int64_t tiles = tiles_of(n), count = size - column < WIDTH ? size - column : WIDTH;
    for (int64_t t = 0; t < tiles; t += TILES) {
        int64_t until = t + TILES < tiles ? t + TILES : tiles, first = tile_start(n, tiles, t);
        int64_t rows = tile_start(n, tiles, until) - first;
        memset(sums, 0, sizeof(float) * rows * WIDTH);
        for (int64_t g = 0; g < groups; g++) {
            const char *weights = panel + g * GROUP_BYTES;
            int32_t begun[WIDTH];
            begin((const int8_t *)weights + WIDTH * 4, begun);
            for (int64_t i = t; i < until; i++) {
                int64_t from = tile_start(n, tiles, i), own = tile_start(n, tiles, i + 1) - from;
                int64_t at = from * groups + g * own;
                tile(x + at * GROUP, scales + at, weights, begun, sums + (from - first) * WIDTH, own);
            }
        }
        for (int64_t r = 0; r < rows; r++)
            memcpy(y + (first + r) * size + column, sums + r * WIDTH, sizeof(float) * count);
    }
}

/* A group of a row, `count` of whose inputs are there: whole numbers moved by `moved`, every `step` bytes four of them, and
 * their scale. What is not finite makes the scale NaN, and with it the row's results. */
static void quantize(const float *x, int64_t count, int64_t step, uint8_t moved, uint8_t *out, float *scale) {
    /* As whole numbers, floats without their sign are in their order too. */
    uint32_t largest = 0;
    for (int64_t k = 0; k < count; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float most;
    memcpy(&most, &largest, 4);
    /* The smallest numbers have no reciprocal. */
    float by = most > 1e-36f && largest < 0x7f800000 ? 127.0f / most : 0.0f;
    *scale = largest < 0x7f800000 ? most / 127.0f : NAN;
    uint8_t whole[GROUP] = {0};
    for (int64_t k = 0; k < count; k++) {
        /* Beside so large a number nothing behind the point is left. */
        float rounded = (by > 0.0f ? x[k] * by : 0.0f) + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &rounded, 4);
        whole[k] = (uint8_t)bits;
    }
    for (int64_t k = 0; k < GROUP; k++) whole[k] = (uint8_t)(whole[k] + moved);
    for (int64_t k = 0; k < GROUP; k += 4) memcpy(out + k / 4 * step, whole + k, 4);
}

/* Group g of all rows, as tiles [tile][group][GROUP / 4][rows][4], with scales [tile][group][rows]. */
static void lay(const float *x, int64_t n, int64_t depth, int64_t groups, int64_t g, uint8_t *out, float *scales) {
    int64_t tiles = tiles_of(n), count = depth - g * GROUP < GROUP ? depth - g * GROUP : GROUP;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t from = tile_start(n, tiles, t), rows = tile_start(n, tiles, t + 1) - from;
        int64_t at = from * groups + g * rows;
        for (int64_t r = 0; r < rows; r++)
            quantize(x + (from + r) * depth + g * GROUP, count, rows * 4, n == 1 ? 0 : MOVED, out + at * GROUP + r * 4,
                     scales + at + r);
    }
}

/* A call: rows x as they came, and `laid` as tiles, with their scales. */
struct call {
    const float *x;
    uint8_t *laid;
    float *scales;
    int32_t *sums; /* of every group of the only row */
    int64_t n, depth, groups, size;
    const char *weights;
    float *y;
};

static void lay_part(void *with, int64_t part, int64_t parts) {
    const struct call *c = with;
    for (int64_t g = c->groups * part / parts; g < c->groups * (part + 1) / parts; g++) {
        lay(c->x, c->n, c->depth, c->groups, g, c->laid, c->scales);
        c->sums[g] = 0;
        for (int64_t k = 0; c->n == 1 && k < GROUP; k++) c->sums[g] += (int8_t)c->laid[g * GROUP + k];
    }
}

static void multiply_part(void *with, int64_t part, int64_t parts) {
    const struct call *c = with;
    int64_t panels = (c->size + WIDTH - 1) / WIDTH, bytes = c->groups * GROUP_BYTES;
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; p++) {
        const char *panel = c->weights + p * bytes;
        int64_t column = p * WIDTH;
#if MOVED
        if (c->n == 1) {
            int64_t count = c->size - column < WIDTH ? c->size - column : WIDTH;
            one_row(c->laid, c->scales, c->sums, c->groups, panel, c->y + column, count);
            continue;
        }
#endif
        one_panel(c->laid, c->scales, c->n, c->groups, panel, c->y, c->size, column);
    }
}

/* Returns 0, or 1 when memory ran out. */
EXPORT int fastblt_linear_int8(const float *x, int64_t n, int64_t depth, const void *weights, int64_t size,
                               int64_t threads, float *y) {
    int64_t groups = (depth + GROUP - 1) / GROUP;
    if (!n) return 0;
    float *scales = malloc(n * groups * (sizeof(float) + GROUP) + groups * sizeof(int32_t));
    if (!scales) return 1;
    int32_t *sums = (int32_t *)(scales + n * groups);
    struct call call = {x, (uint8_t *)(sums + groups), scales, sums, n, depth, groups, size, weights, y};
    share(lay_part, &call, n * depth < SMALL ? 1 : threads);
    share(multiply_part, &call, threads);
    free(scales);
    return 0;
}

/* Outputs from `first` on as a panel. Returns the most weights of one of them that became nothing. */
static int64_t pack_panel(const float *weights, int64_t first, int64_t size, int64_t depth, int64_t groups, char *to) {
    int64_t lost[WIDTH] = {0}, most = 0;
    memset(to, 0, groups * GROUP_BYTES);
    for (int64_t g = 0; g < groups; g++, to += GROUP_BYTES) {
        int64_t k = g * GROUP, count = depth - k < GROUP ? depth - k : GROUP;
        for (int64_t i = 0; i < WIDTH && first + i < size; i++) {
            const float *from = weights + (first + i) * depth + k;
            uint8_t whole[GROUP];
            quantize(from, count, 4, 0, whole, (float *)to + i);
            for (int64_t j = 0; j < count; j++) {
                to[WIDTH * 4 + (j / 4 * WIDTH + i) * 4 + j % 4] = (char)whole[j];
                lost[i] += !whole[j] && from[j] != 0.0f;
            }
        }
    }
    for (int64_t i = 0; i < WIDTH; i++) most = lost[i] > most ? lost[i] : most;
    return most;
}

/* W [size, depth] as panels of groups. Returns the largest share of an output's weights that became nothing. */
EXPORT float fastblt_pack_int8(const float *weights, int64_t size, int64_t depth, int64_t threads, void *to) {
    int64_t panels = (size + WIDTH - 1) / WIDTH, groups = (depth + GROUP - 1) / GROUP;
    int64_t most = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most) if (threads > 1)
    for (int64_t p = 0; p < panels; p++) {
        int64_t own = pack_panel(weights, p * WIDTH, size, depth, groups, (char *)to + p * groups * GROUP_BYTES);
        most = own > most ? own : most;
    }
    return (float)most / (float)depth;
}
