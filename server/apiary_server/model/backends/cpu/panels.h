/* What the linear layers share: a weight lies in panels of COLUMNS outputs, in the order in which they are read. */

#include <stdint.h>

enum { LANES = 16, VECTORS = 3, COLUMNS = LANES * VECTORS };
enum { AHEAD = 8192 }; /* bytes: weights are asked of memory so long before they are used */

typedef struct {
    int64_t rows, inputs, outputs;
    const float *input; /* [rows, inputs] */
    int64_t input_row;
    const void *weights; /* [outputs / COLUMNS, rounded up, ...]: panels, zeros beyond the last output */
    const float *bias;   /* [outputs, rounded up], or NULL */
    float *output;       /* [rows, outputs], contiguous */
    const void *scales, *offsets; /* of weights in eight bits, [outputs, rounded up]; else NULL */
    const float *signs;           /* of such, [inputs]; else NULL */
} Linear;

/* Which of LANES outputs there are where so many are left. */
static inline uint16_t lanes(int64_t left) {
    return left >= LANES ? 0xffff : left > 0 ? (uint16_t)((1u << left) - 1) : 0;
}
