/* What the linear layers share: a weight lies in panels of COLUMNS outputs, in the order in which they are read. */

#include "lanes.h"

enum { VECTORS = 3, COLUMNS = LANES * VECTORS };
enum { LINE = 64, ROUND = VECTORS * LINE }; /* bytes of a panel that are read at a time */
enum { AHEAD = 8192 };                      /* bytes: weights are asked of memory so long before they are used */

typedef struct {
    int64_t rows, inputs, outputs;
    int64_t kind; /* of the panels, where a kernel has several */
    const float *input; /* [rows, inputs] */
    int64_t input_row;
    const void *weights; /* [outputs / COLUMNS, rounded up, ...]: panels, zeros beyond the last output */
    const float *bias;   /* [outputs, rounded up], or NULL */
    float *output;       /* [rows, outputs], contiguous */
    const void *scales, *offsets; /* of weights in eight bits, [outputs, rounded up]; else NULL */
    const float *signs;           /* of such, [inputs]; else NULL */
    void *room; /* of such, for the rows' codes and scales: as many bytes as [rows, inputs / 4, rounded up, + 1] floats */
} Linear;

/* What to ask of memory in the first of `rounds` over a panel of so many bytes, for a block of rows, and how much further in each. The
   first block reads the panel from memory and the others from the cache; so that memory never rests, all of them (the
   first SHARING, of very many) share in asking for the panel behind it, so early that the first block never waits. */
typedef struct {
    const char *at;
    int64_t step;
} Ahead;

static inline Ahead ahead(const void *panel, int64_t size, int64_t rounds, int64_t block, int64_t blocks) {
    enum { SHARING = 16 };
    int64_t sharing = blocks < SHARING ? blocks : SHARING, step = (size / rounds + sharing - 1) / sharing;
    const char *first = (const char *)panel + AHEAD + size - size / sharing;
    return block < sharing ? (Ahead){first + block * rounds * step, step} : (Ahead){first + size, 0};
}

/* Calls DO for a block of as many rows as are left, a constant, and ROWS at most. */
enum { ROWS = 8 };
#define BY_ROWS(left, DO)      \
    switch (left) {            \
    default: DO(ROWS); break;  \
    case 7: DO(7); break;      \
    case 6: DO(6); break;      \
    case 5: DO(5); break;      \
    case 4: DO(4); break;      \
    case 3: DO(3); break;      \
    case 2: DO(2); break;      \
    case 1: DO(1); break;      \
    }
