/* Threads that share the work of short calls which follow each other closely: team.c says how they wait. */
#pragma once
#include <stdint.h>

/* Parts of a work for each thread. */
#define PARTS_EACH 4

/* Part `part` of `parts` of a work. */
typedef void (*work)(void *with, int64_t part, int64_t parts);

/* Runs all parts, by up to so many threads, this one among them. How many parts there are, and which thread runs which,
 * must not matter. */
void share(work run, void *with, int64_t threads);

/* Item `item` of some; `room` is a number below rooms_for(threads) that no other item has at the same time. */
typedef void (*item_work)(void *with, int64_t item, int64_t room);

static inline int64_t rooms_for(int64_t threads) { return threads > 1 ? PARTS_EACH * threads : 1; }

/* Runs `count` items, by up to so many threads, this one among them, each of which takes the next as it comes to be
 * free. */
void share_out(item_work run, void *with, int64_t count, int64_t threads);
