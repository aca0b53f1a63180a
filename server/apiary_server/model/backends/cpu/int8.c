/* Linear layers of eight-bit weights, with activations of two eight-bit digits per row.

   A row x is scale * (high + low / 254), high and low being whole numbers from -127 to 127. Sums of whole
   numbers are exact, so a row's result does not depend on the other rows. The processor's instruction
   multiplies unsigned by signed bytes; digits are stored 128 too large, and `offsets`, int32, 128 times each
   output's sum of weights, takes that back. A panel of the weight is int8 [inputs / 4, rounded up, COLUMNS, 4];
   `scales` are float. */

#include "panels.h"

#include <math.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { ROWS = 4, DIGITS = 2 };

/* Digits of one row, `quads` * 4 of each, and its scale. */
TARGET static float digits(const float *restrict row, int64_t inputs, int64_t quads, uint8_t *restrict high,
                           uint8_t *restrict low) {
    __m512 largest = _mm512_set1_ps(1e-12f * 127);
    for (int64_t k = 0; k < inputs; k += LANES)
        largest = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(inputs - k), row + k)), largest);
    float most = _mm512_reduce_max_ps(largest);
    float scale = most / 127, inverse = 127 / most;
    for (int64_t k = 0; k < inputs; k++) {
        float value = row[k] * inverse, whole = rintf(value);
        high[k] = (uint8_t)((int32_t)whole + 128);
        low[k] = (uint8_t)((int32_t)rintf((value - whole) * 254) + 128);
    }
    for (int64_t k = inputs; k < quads * 4; k++) high[k] = low[k] = 128;
    return scale;
}

/* COLUMNS outputs of `rows` rows. */
INLINE void block(const int rows, const Linear *task, int64_t first, int64_t column, int64_t quads,
                  const uint8_t *restrict codes, const float *restrict scales) {
    const int8_t *weights = (const int8_t *)task->weights + column * quads * 4;
    __m512i sums[ROWS * DIGITS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows * DIGITS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++) {
        __m512i some[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            const int8_t *at = weights + (q * VECTORS + v) * LANES * 4;
            some[v] = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows * DIGITS; r++) {
            __m512i digit = _mm512_set1_epi32(((const int32_t *)codes)[r * quads + q]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], digit, some[v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = column + v * LANES;
            __mmask16 mask = lanes(task->outputs - at);
            if (!mask) continue;
            __m512i offset = _mm512_loadu_si512((const int32_t *)task->offsets + at);
            __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r * DIGITS][v], offset));
            __m512 low = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r * DIGITS + 1][v], offset));
            __m512 result = _mm512_fmadd_ps(low, _mm512_set1_ps(1.0f / 254), high);
            result = _mm512_mul_ps(result, _mm512_loadu_ps((const float *)task->scales + at));
            result = _mm512_mul_ps(result, _mm512_set1_ps(scales[r]));
            if (task->bias) result = _mm512_add_ps(result, _mm512_loadu_ps(task->bias + at));
            _mm512_mask_storeu_ps(task->output + (first + r) * task->outputs + at, mask, result);
        }
}

TARGET static void columns(const Linear *task, int64_t column, int64_t quads, const uint8_t *codes,
                           const float *scales) {
    int64_t row = 0;
#define BLOCK(ROWS_) block(ROWS_, task, row, column, quads, codes + row * DIGITS * quads * 4, scales + row)
    for (; row + ROWS <= task->rows; row += ROWS) BLOCK(4);
    switch (task->rows - row) {
    case 3: BLOCK(3); break;
    case 2: BLOCK(2); break;
    case 1: BLOCK(1); break;
    }
#undef BLOCK
}

int apiary_int8_supported(void) { return __builtin_cpu_supports("avx512vnni") != 0; }

/* Returns 0, or 1 where there was no memory for the digits. */
int apiary_int8_linear(const Linear *task) {
    int64_t quads = (task->inputs + 3) / 4;
    uint8_t *codes = malloc(task->rows * DIGITS * quads * 4);
    float *scales = malloc(task->rows * sizeof *scales);
    int failed = codes == NULL || scales == NULL;
    if (!failed) {
#pragma omp parallel
        {
#pragma omp for
            for (int64_t row = 0; row < task->rows; row++) {
                uint8_t *high = codes + row * DIGITS * quads * 4;
                scales[row] = digits(task->input + row * task->input_row, task->inputs, quads, high, high + quads * 4);
            }
#pragma omp for schedule(guided) /* see float32.c */
            for (int64_t column = 0; column < task->outputs; column += COLUMNS)
                columns(task, column, quads, codes, scales);
        }
    }
    free(codes);
    free(scales);
    return failed;
}
#else
int apiary_int8_supported(void) { return 0; }
int apiary_int8_linear(const Linear *task) { return task != 0; }
#endif
