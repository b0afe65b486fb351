/* A module over the paged caches of running requests, for calls that make several passes; behind stack.c. */
#pragma once
#include <time.h>

struct part {
    const struct module *module;
    float *const *caches;
    const struct places *at;
    const struct source *from;
    const struct sink *to;
};

/* Seconds of a clock. */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
