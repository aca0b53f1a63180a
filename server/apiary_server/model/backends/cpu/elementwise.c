/* What lies between a decoder's products, for float32 rows: normalisation, rotation, the gate. Each is one
   pass over its rows. */

#include "kernels.h"

typedef struct {
    int64_t rows, size;
    float *input; /* [rows, size], contiguous */
    const float *more, *weight;
    float *output;
    float eps;
} Norm;

typedef struct {
    int64_t rows, heads, half, stride;
    float *input; /* [rows.., heads.., 2 * half], rows `stride` apart */
    const float *cosines, *sines; /* [rows, half] */
} Rotate;

typedef struct {
    int64_t rows, size;
    const float *input; /* [rows, 2 * size], contiguous */
    float *output;
} Gate;

typedef struct {
    int64_t rows, size;
    const float *input; /* [.., size], contiguous */
    const int64_t *index;
    float *output;
} Take;

FOR_EACH_PROCESSOR static void norm(int64_t size, float *restrict row, const float *restrict more,
                                    const float *restrict weight, float eps, float *restrict output) {
    float sum = 0;
    if (more)
        for (int64_t i = 0; i < size; i++) row[i] += more[i];
    for (int64_t i = 0; i < size; i++) sum += row[i] * row[i];
    float factor = 1.0f / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < size; i++) output[i] = row[i] * factor * weight[i];
}

/* input += more, where there is more; output = input / rms(input) * weight. */
int apiary_norm(const Norm *task) {
    int64_t size = task->size;
#pragma omp for nowait
    for (int64_t r = 0; r < task->rows; r++)
        norm(size, task->input + r * size, task->more ? task->more + r * size : NULL, task->weight, task->eps,
             task->output + r * size);
    return 0;
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

/* Rotates the first `heads` of each row in place. */
int apiary_rotate(const Rotate *task) {
    int64_t half = task->half;
#pragma omp for nowait
    for (int64_t r = 0; r < task->rows; r++)
        rotate(task->heads, half, task->input + r * task->stride, task->cosines + r * half, task->sines + r * half);
    return 0;
}

FOR_EACH_PROCESSOR static void gate(int64_t size, const float *restrict row, float *restrict output) {
    for (int64_t i = 0; i < size; i++) output[i] = row[i] / (1.0f + exponential(-row[i])) * row[size + i];
}

/* output = silu(input[:, :size]) * input[:, size:] */
int apiary_gate(const Gate *task) {
    int64_t size = task->size;
#pragma omp for nowait
    for (int64_t r = 0; r < task->rows; r++) gate(size, task->input + r * 2 * size, task->output + r * size);
    return 0;
}

/* output = input[index] */
int apiary_take(const Take *task) {
    int64_t size = task->size;
#pragma omp for nowait
    for (int64_t r = 0; r < task->rows; r++)
        memcpy(task->output + r * size, task->input + task->index[r] * size, size * sizeof(float));
    return 0;
}
