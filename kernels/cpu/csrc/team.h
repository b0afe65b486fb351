/* Threads that share the work of short calls which follow each other closely: team.c says how they wait. */
#pragma once
#include <stdint.h>

/* Part `part` of `parts` of a work. */
typedef void (*work)(void *with, int64_t part, int64_t parts);

/* Runs all parts, by up to so many threads, this one among them. How many parts there are, and which thread runs which,
 * must not matter. */
void share(work run, void *with, int64_t threads);
