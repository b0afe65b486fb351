#pragma once
#include <stdint.h>

/* The page of every (request, position // page). */
struct pages {
    const int32_t *table;
    int64_t stride, page;
};

static inline int64_t slot_of(const struct pages *at, int64_t owner, int64_t position) {
    return (int64_t)at->table[owner * at->stride + position / at->page] * at->page + position % at->page;
}
