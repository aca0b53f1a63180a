/* Linear layers of eight-bit weights and activations.

   Both are turned, as `linear.turned` says, which leaves their products as they are. A row x, turned, is scale * code,
   code being whole numbers from -127 to 127. Sums of whole numbers are exact, so a row's result does not depend on
   the other rows. The processor's instruction multiplies unsigned by signed bytes; codes are stored 128 too large,
   and `offsets`, int32, 128 times each output's sum of weights, takes that back. A panel of the weight is int8
   [inputs / 4, rounded up, COLUMNS, 4]; `scales` are float; `signs` are those of `linear.signs`. */

#include "panels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* One stage of a Hadamard transform, between lanes of a vector whose numbers differ in `bit`. */
INLINE __m512 butterfly(__m512 x, int bit) {
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 twin = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(bit)), x);
    __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    return _mm512_mask_sub_ps(_mm512_add_ps(x, twin), upper, twin, x);
}

/* `x`, [length], a power of 2, times the Hadamard matrix; its rows have length 1 where `factor` is 1 / sqrt(length). */
TARGET static void hadamard(float *x, int64_t length, float factor) {
    for (int64_t half = LANES; half < length; half *= 2)
        for (int64_t pair = 0; pair < length; pair += 2 * half)
            for (int64_t k = pair; k < pair + half; k += LANES) {
                __m512 left = _mm512_loadu_ps(x + k), right = _mm512_loadu_ps(x + k + half);
                _mm512_storeu_ps(x + k, _mm512_add_ps(left, right));
                _mm512_storeu_ps(x + k + half, _mm512_sub_ps(left, right));
            }
    for (int64_t k = 0; k < length; k += LANES) {
        __mmask16 mask = lanes(length - k);
        __m512 some = _mm512_maskz_loadu_ps(mask, x + k);
        if (length > 1) some = butterfly(some, 1);
        if (length > 2) some = butterfly(some, 2);
        if (length > 4) some = butterfly(some, 4);
        if (length > 8) some = butterfly(some, 8);
        _mm512_mask_storeu_ps(x + k, mask, _mm512_mul_ps(some, _mm512_set1_ps(factor)));
    }
}

/* `linear.turned`, of one row. */
TARGET static void turn(float *row, int64_t inputs, const float *restrict signs) {
    int64_t window = 1;
    while (window * 2 <= inputs) window *= 2;
    float factor = 1 / sqrtf((float)window);
    hadamard(row, window, factor);
    if (window == inputs) return;
    for (int64_t k = 0; k < inputs; k++) row[k] *= signs[k];
    hadamard(row + inputs - window, window, factor);
}

/* Codes of one row, `quads` * 4 of them, and its scale. `room` is for `quads` * 4 floats. */
TARGET static float encode(const Linear *task, const float *restrict row, int64_t quads, float *restrict room,
                           uint8_t *restrict codes) {
    memset(room + quads * 4 - 4, 0, 4 * sizeof *room);
    memcpy(room, row, task->inputs * sizeof *room);
    turn(room, task->inputs, task->signs);
    __m512 largest = _mm512_set1_ps(1e-12f * 127);
    __mmask16 none = 0; /* which are no numbers */
    for (int64_t k = 0; k < quads * 4; k += LANES) {
        __m512 some = _mm512_maskz_loadu_ps(lanes(quads * 4 - k), room + k);
        largest = _mm512_max_ps(_mm512_abs_ps(some), largest);
        none |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
    }
    float most = none ? NAN : _mm512_reduce_max_ps(largest);
    __m512 inverse = _mm512_set1_ps(127 / most);
    for (int64_t k = 0; k < quads * 4; k += LANES) {
        __mmask16 mask = lanes(quads * 4 - k);
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, room + k), inverse));
        _mm512_mask_cvtepi32_storeu_epi8(codes + k, mask, _mm512_add_epi32(code, _mm512_set1_epi32(128)));
    }
    return most / 127;
}

/* COLUMNS outputs of `rows` rows. */
INLINE void block(const int rows, const Linear *task, int64_t first, int64_t column, int64_t quads,
                  const int8_t *restrict weights, Ahead next, const uint8_t *restrict codes,
                  const float *restrict scales) {
    __m512i sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++, weights += ROUND, next.at += next.step) {
        __m512i some[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            some[v] = _mm512_loadu_si512(weights + v * LINE);
            _mm_prefetch(next.at + v * LINE, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512i code = _mm512_set1_epi32(((const int32_t *)codes)[r * quads + q]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], code, some[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = column + v * LANES;
            __mmask16 mask = lanes(task->outputs - at);
            if (!mask) continue;
            __m512i offset = _mm512_loadu_si512((const int32_t *)task->offsets + at);
            __m512 result = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], offset));
            result = _mm512_mul_ps(result, _mm512_loadu_ps((const float *)task->scales + at));
            result = _mm512_mul_ps(result, _mm512_set1_ps(scales[r]));
            if (task->bias) result = _mm512_add_ps(result, _mm512_loadu_ps(task->bias + at));
            _mm512_mask_storeu_ps(task->output + (first + r) * task->outputs + at, mask, result);
        }
}

TARGET static void columns(const Linear *task, int64_t column, int64_t quads, const uint8_t *codes,
                           const float *scales) {
    const int8_t *panel = (const int8_t *)task->weights + column * quads * 4;
    int64_t blocks = (task->rows + ROWS - 1) / ROWS;
    for (int64_t b = 0, row = 0; b < blocks; b++, row += ROWS) {
        Ahead next = ahead(panel, quads * ROUND, quads, b, blocks);
#define BLOCK(ROWS_) block(ROWS_, task, row, column, quads, panel, next, codes + row * quads * 4, scales + row)
        BY_ROWS(task->rows - row, BLOCK);
#undef BLOCK
    }
}

int apiary_int8_supported(void) { return __builtin_cpu_supports("avx512vnni") != 0; }

/* `linear.turned`, in place: rows float [count, inputs]. */
TARGET void apiary_int8_turn(float *rows, int64_t count, int64_t inputs, const float *signs) {
#pragma omp parallel for
    for (int64_t row = 0; row < count; row++) turn(rows + row * inputs, inputs, signs);
}

/* Returns 0, or 1 where there was no memory. */
int apiary_int8_linear(const Linear *task) {
    int64_t quads = (task->inputs + 3) / 4;
    uint8_t *codes = task->room;
    float *scales = (float *)task->room + task->rows * quads, *room = malloc(quads * 4 * sizeof *room);
#pragma omp for
    for (int64_t row = 0; row < task->rows; row++)
        if (room) scales[row] = encode(task, task->input + row * task->input_row, quads, room, codes + row * quads * 4);
    free(room);
#pragma omp for schedule(guided) nowait /* see float32.c */
    for (int64_t column = 0; column < task->outputs; column += COLUMNS)
        columns(task, column, quads, codes, scales);
    return room == NULL;
}
#else
int apiary_int8_supported(void) { return 0; }
int apiary_int8_linear(const Linear *task) { return task != 0; }
#endif
