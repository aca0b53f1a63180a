/* Linear layers of float32.

   A panel of the weight, [inputs, COLUMNS], is read once for up to ROWS rows, from the cache for every ROWS more.
   Each sum is taken over the inputs in order, whatever the number of rows,
   so a row's result does not depend on the other rows. */

#include "panels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { ROWS = 8, SHARE = 64 };

/* COLUMNS outputs of `rows` rows. */
INLINE void block(const int rows, const Linear *task, int64_t first, int64_t column) {
    const float *restrict weights = (const float *)task->weights + column * task->inputs;
    const float *restrict input = task->input + first * task->input_row;
    const int64_t inputs = task->inputs, stride = task->input_row;
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = task->bias ? _mm512_loadu_ps(task->bias + column + v * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k++, weights += COLUMNS) {
        __m512 some[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            some[v] = _mm512_loadu_ps(weights + v * LANES);
            _mm_prefetch((const char *)(weights + v * LANES) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 value = _mm512_set1_ps(input[r * stride + k]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_fmadd_ps(value, some[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = column + v * LANES;
            __mmask16 mask = lanes(task->outputs - at);
            if (mask) _mm512_mask_storeu_ps(task->output + (first + r) * task->outputs + at, mask, sums[r][v]);
        }
}

/* COLUMNS outputs of the rows from `row` to before `end`. */
TARGET static void columns(const Linear *task, int64_t column, int64_t row, int64_t end) {
    for (; row + ROWS <= end; row += ROWS) block(ROWS, task, row, column);
    switch (end - row) {
    case 7: block(7, task, row, column); break;
    case 6: block(6, task, row, column); break;
    case 5: block(5, task, row, column); break;
    case 4: block(4, task, row, column); break;
    case 3: block(3, task, row, column); break;
    case 2: block(2, task, row, column); break;
    case 1: block(1, task, row, column); break;
    }
}

int apiary_float32_supported(void) { return __builtin_cpu_supports("avx512f") != 0; }

/* Returns 0, as it needs no memory. A thread is dealt its share of what is left each time it asks: long streams of memory at first, and
   little at the end, since the threads that deliver tokens take a processor now and then. */
int apiary_float32_linear(const Linear *task) {
#pragma omp parallel for collapse(2) schedule(guided)
    for (int64_t row = 0; row < task->rows; row += SHARE)
        for (int64_t column = 0; column < task->outputs; column += COLUMNS)
            columns(task, column, row, row + SHARE < task->rows ? row + SHARE : task->rows);
    return 0;
}
#else
int apiary_float32_supported(void) { return 0; }
int apiary_float32_linear(const Linear *task) { return task != 0; }
#endif
