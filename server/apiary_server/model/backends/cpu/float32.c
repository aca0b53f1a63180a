/* Linear layers of float32.

   A panel of the weight, [inputs, COLUMNS], is read once for up to ROWS rows, from the cache for every ROWS more.
   Where `halves`, its numbers are bfloat16, [inputs / 2, COLUMNS, 2], and become float32 as they are read. Each sum is
   taken over the inputs in order, whatever the number of rows, so a row's result does not depend on the other rows. */

#include "panels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { SHARE = 64 };

/* COLUMNS outputs of `rows` rows. */
INLINE void block(const int rows, const int halves, const Linear *task, int64_t first, int64_t column,
                  const char *restrict weights, Ahead next) {
    const float *restrict input = task->input + first * task->input_row;
    const int64_t inputs = task->inputs, stride = task->input_row;
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = task->bias ? _mm512_loadu_ps(task->bias + column + v * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 1 + halves, weights += ROUND, next.at += next.step) {
        __m512i line[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            line[v] = _mm512_loadu_si512(weights + v * LINE);
            _mm_prefetch(next.at + v * LINE, _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int half = 0; half <= halves; half++) {
            __m512 some[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) {
                __m512i bits = halves ? _mm512_slli_epi32(line[v], 16) : line[v];
                some[v] = _mm512_castsi512_ps(half ? _mm512_and_si512(line[v], _mm512_set1_epi32((int)0xffff0000)) : bits);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                __m512 value = _mm512_set1_ps(input[r * stride + k + half]);
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_fmadd_ps(value, some[v], sums[r][v]);
            }
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
INLINE void columns(const int halves, const Linear *task, int64_t column, int64_t row, int64_t end) {
    const char *panel = (const char *)task->weights + column * task->inputs * (halves ? 2 : 4);
    int64_t blocks = (end - row + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; b++, row += ROWS) {
        Ahead next = ahead(panel, halves ? task->inputs / 2 : task->inputs, b, blocks);
#define BLOCK(ROWS_) block(ROWS_, halves, task, row, column, panel, next)
        BY_ROWS(end - row, BLOCK);
#undef BLOCK
    }
}

TARGET static void columns_of(const Linear *task, int64_t column, int64_t row, int64_t end) {
    if (task->halves)
        columns(1, task, column, row, end);
    else
        columns(0, task, column, row, end);
}

int apiary_float32_supported(void) { return __builtin_cpu_supports("avx512f") != 0; }

/* Returns 0, as it needs no memory. A thread is dealt its share of what is left each time it asks: long streams of
   memory at first, and little at the end, since the threads that deliver tokens take a processor now and then. */
int apiary_float32_linear(const Linear *task) {
#pragma omp for collapse(2) schedule(guided) nowait
    for (int64_t row = 0; row < task->rows; row += SHARE)
        for (int64_t column = 0; column < task->outputs; column += COLUMNS)
            columns_of(task, column, row, row + SHARE < task->rows ? row + SHARE : task->rows);
    return 0;
}
#else
int apiary_float32_supported(void) { return 0; }
int apiary_float32_linear(const Linear *task) { return task != 0; }
#endif
