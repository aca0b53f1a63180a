/* What lies between a decoder's products, for float32 rows: normalisation, rotation, the gate. Each is one
   pass over its rows, which are few in decoding; so threads share them only where they are many. */

#include "kernels.h"

enum { MANY = 1 << 16 };

FOR_EACH_PROCESSOR static void norm(int64_t size, float *restrict row, const float *restrict more,
                                    const float *restrict weight, float eps, float *restrict output) {
    float sum = 0;
    if (more)
        for (int64_t i = 0; i < size; i++) row[i] += more[i];
    for (int64_t i = 0; i < size; i++) sum += row[i] * row[i];
    float factor = 1.0f / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < size; i++) output[i] = row[i] * factor * weight[i];
}

/* rows += more, where there is more; output = rows / rms(rows) * weight. All `[rows, size]`, contiguous. */
void apiary_norm(int64_t count, int64_t size, float *rows, const float *more, const float *weight, float eps,
                 float *output) {
#pragma omp parallel for if (count * size >= MANY)
    for (int64_t r = 0; r < count; r++)
        norm(size, rows + r * size, more ? more + r * size : NULL, weight, eps, output + r * size);
}

FOR_EACH_PROCESSOR static void rotate(int64_t heads, int64_t half, float *restrict row, const float *restrict cosines,
                                      const float *restrict sines) {
    for (int64_t h = 0; h < heads; h++, row += 2 * half)
        for (int64_t i = 0; i < half; i++) {
            float first = row[i], second = row[half + i];
            row[i] = first * cosines[i] - second * sines[i];
            row[half + i] = second * cosines[i] + first * sines[i];
        }
}

/* Rotates the first `heads` of each row `[heads.., 2 * half]` in place, rows `stride` apart; cosines and sines
   are `[rows, half]`. */
void apiary_rotate(int64_t count, int64_t heads, int64_t half, int64_t stride, float *rows, const float *cosines,
                   const float *sines) {
#pragma omp parallel for if (count * heads * half >= MANY)
    for (int64_t r = 0; r < count; r++)
        rotate(heads, half, rows + r * stride, cosines + r * half, sines + r * half);
}

FOR_EACH_PROCESSOR static void gate(int64_t size, const float *restrict row, float *restrict output) {
    for (int64_t i = 0; i < size; i++) output[i] = row[i] / (1.0f + exponential(-row[i])) * row[size + i];
}

/* output = silu(rows[:, :size]) * rows[:, size:], rows `[rows, 2 * size]`. */
void apiary_gate(int64_t count, int64_t size, const float *rows, float *output) {
#pragma omp parallel for if (count * size >= MANY)
    for (int64_t r = 0; r < count; r++) gate(size, rows + r * 2 * size, output + r * size);
}
