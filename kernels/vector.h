#pragma once
#include <string.h>

/* Eight floats; compilers map them to whatever vectors the machine has. */
typedef float v8 __attribute__((vector_size(32)));

static inline v8 load(const float *x) {
    v8 out;
    memcpy(&out, x, sizeof out);
    return out;
}
