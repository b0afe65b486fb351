#pragma once
#include <stdint.h>
#include <string.h>

/* Eight floats; compilers map them to whatever vectors the machine has. */
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));

static inline v8 load(const float *x) {
    v8 out;
    memcpy(&out, x, sizeof out);
    return out;
}

/* Of each place the first where `which` has all bits, the second where it has none. */
static inline v8 choose(i8 which, v8 first, v8 second) {
    return (v8)((which & (i8)first) | (~which & (i8)second));
}

/* exp_below of eight, where a compiler may not find the vectors itself. */
static inline v8 exp_eight(v8 x) {
    x = choose(x < -87.0f, (v8){0} - 87.0f, x);
    /* Beside so large a number nothing behind the point is left. */
    v8 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    v8 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    v8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    return p * (v8)((__builtin_convertvector(n, i8) + 127) << 23);
}
