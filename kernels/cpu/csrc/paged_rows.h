/* Rows of numbers that are kept in pages, one for every position of a request: paged_rows.py has the shapes. */
#pragma once
#include <stdint.h>

/* A page table: lines of `stride` entries, of which entry p / page is the page of position p. */
struct pages {
    const int32_t *table;
    int64_t stride, page;
};

/* Where the row of a request's position lies in the store. */
static inline int64_t slot_of(const struct pages *at, int64_t owner, int64_t position) {
    return (int64_t)at->table[owner * at->stride + position / at->page] * at->page + position % at->page;
}
