/* The first of the largest logits of each row. */

#include "kernels.h"

enum { PART = 1024 }; /* logits whose maximum is taken together; only the one that has the largest is searched */

typedef struct {
    int64_t rows, size;
    const float *input; /* [rows, size], rows `stride` apart */
    int64_t stride;
    int64_t *tokens; /* [rows] */
    float *largest;  /* [rows] */
} Likeliest;

/* Where the first number of `row` is that equals `value`, or that is NaN if this is. */
INLINE int64_t find(const float *row, float value) {
    int64_t at = 0;
    while (row[at] != value && (row[at] == row[at] || value == value)) at++;
    return at;
}

FOR_EACH_PROCESSOR static void likeliest(const Likeliest *task, int64_t r) {
    const float *row = task->input + r * task->stride, *best = row;
    float most = row[0];
    for (int64_t first = 0; first < task->size; first += PART) {
        int64_t count = task->size - first < PART ? task->size - first : PART;
        int odd = 0;
        for (int64_t j = first; j < first + count; j++) odd |= row[j] != row[j];
        if (odd) { /* NaN is larger than all */
            best = row + first, most = NAN;
            break;
        }
        float value = largest(row + first, count);
        if (value > most) best = row + first, most = value;
    }
    task->tokens[r] = best - row + find(best, most);
    task->largest[r] = most;
}

int apiary_likeliest(const Likeliest *task) {
#pragma omp for nowait
    for (int64_t r = 0; r < task->rows; r++) likeliest(task, r);
    return 0;
}
