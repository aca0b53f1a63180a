/* How attention of one token reads a head's entries: several query heads that share them at a time, and memory asked
   for ahead. */

#pragma once

#include "kernels.h"

enum { GROUP = 4, LINE = 64, AHEAD = 32768 };

/* How many query heads are computed together. */
INLINE int together(int64_t heads) {
    if (heads == 6 || heads == 9) return 3; /* no remainder */
    return heads < GROUP ? (int)heads : GROUP;
}

/* Memory that is read from its front to its `end`, and what is read after it: keys, values, the next head's keys. */
typedef struct {
    const char *end, *next;
} Stream;

/* Asks for `bytes` of what is read soon, when `at` is read now. */
INLINE void ahead(Stream stream, const void *at, int bytes) {
    int64_t left = stream.end - (const char *)at - AHEAD;
    const char *soon = left > 0 ? stream.end - left : stream.next - left;
    for (int byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(soon + byte, 0, 3);
}

/* Asks for all of it. */
INLINE void fetch(const void *memory, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch((const char *)memory + byte, 0, 3);
}
