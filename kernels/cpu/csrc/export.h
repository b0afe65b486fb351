/* The library hides all of its symbols but the functions that Python calls (cpu/native.py has their types). */
#pragma once

#define EXPORT __attribute__((visibility("default")))
