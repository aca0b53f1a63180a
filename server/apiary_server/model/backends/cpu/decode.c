/* Attention of one new token in each of many sessions, one pass over each cache where it lies.

   Every pair of a row and a KV head is one piece of work: logits, softmax, what policies record, and the
   weighted sum of values, while the head's entries are in the processor's cache. Its result depends on
   nothing outside of its row. Threads are OpenMP's; the symbols come from the library that torch has
   loaded, so that both share one pool of threads. */

#include "kernels.h"

#include <stdlib.h>

enum { GROUP = 4, WIDTH = 64 };

/* Strides count elements. The last dimension of all tensors is contiguous. */
typedef struct {
    int64_t layer, rows, kv_heads, group, dim, bfloat16, states;
    const float *queries; /* [rows, kv_heads * group, dim] */
    int64_t query_row;
    const float *new_keys, *new_values; /* [rows, kv_heads, dim]: to be written as the last entries, or NULL */
    int64_t new_key_row, new_value_row;
    void *keys, *values; /* [layers, rows, kv_heads, entries, dim], in any order of the first three */
    int64_t cache_layer, cache_row, cache_head;
    const int64_t *lengths; /* [rows] */
    const int64_t *seen;    /* [rows] */
    float *output;          /* [rows, kv_heads * group, dim], contiguous */
    int64_t longest;
    float scale;
    float log_n; /* 0: none */
    State state[MOST_STATES];
} Decode;

INLINE void write(const float *restrict from, void *restrict memory, int64_t at, int64_t dim, int bfloat16) {
    for (int64_t d = 0; d < dim; d++) {
        if (!bfloat16) {
            ((float *)memory)[at + d] = from[d];
            continue;
        }
        uint32_t bits;
        memcpy(&bits, &from[d], sizeof bits);
        uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* even where it is a tie */
        ((uint16_t *)memory)[at + d] = (uint16_t)(from[d] != from[d] ? bits >> 16 | 0x40 : nearest);
    }
}

/* weights[g, j] = queries[g] . keys[j], for `group` heads that share the keys */
INLINE void dot(int group, int dim, int bfloat16, const float *restrict queries, const void *restrict keys,
                int64_t entries, float *restrict weights) {
    for (int64_t j = 0; j < entries; j++) {
        float sums[GROUP] = {0};
        for (int g = 0; g < group; g++)
            for (int d = 0; d < dim; d++) sums[g] += queries[g * dim + d] * element(keys, j * dim + d, bfloat16);
        for (int g = 0; g < group; g++) weights[g * entries + j] = sums[g];
    }
}

/* output[g, :width] = sum over j of weights[g, j] * values[j, :width] */
INLINE void combine(int group, int width, int dim, int bfloat16, const float *restrict weights,
                    const void *restrict values, int64_t first, int64_t entries, float *restrict output) {
    float sums[GROUP * WIDTH] = {0};
    for (int64_t j = 0; j < entries; j++)
        for (int g = 0; g < group; g++)
            for (int d = 0; d < width; d++)
                sums[g * width + d] += weights[g * entries + j] * element(values, first + j * dim + d, bfloat16);
    for (int g = 0; g < group; g++)
        for (int d = 0; d < width; d++) output[g * dim + d] = sums[g * width + d];
}

INLINE void record(const State *state, int64_t layer, int64_t row, int64_t head, int64_t group, int64_t entries, int64_t seen,
                   const float *restrict weights) {
    int64_t at = layer * state->layer + row * state->row + head * state->head;
    if (state->votes) {
        int32_t *restrict last = (int32_t *)state->into + at;
        for (int64_t j = 0; j < entries; j++) {
            float most = 0;
            for (int64_t g = 0; g < group; g++) most = fmaxf(most, weights[g * entries + j]);
            last[j] = most * (float)entries >= 1.0f ? (int32_t)seen : last[j];
        }
    } else {
        float *restrict mass = (float *)state->into + at;
        for (int64_t j = 0; j < entries; j++) {
            float sum = 0;
            for (int64_t g = 0; g < group; g++) sum += weights[g * entries + j];
            mass[j] = mass[j] * state->decay + sum;
        }
    }
}

/* One KV head of one row, compiled for constants where they are known. */
INLINE void head(int group, int dim, int bfloat16, const Decode *task, int64_t row, int64_t head,
                 float *restrict weights) {
    int64_t entries = task->lengths[row], size = bfloat16 ? 2 : 4;
    int64_t cache = (task->layer * task->cache_layer + row * task->cache_row + head * task->cache_head) * size;
    const float *queries = task->queries + row * task->query_row + head * task->group * dim;
    char *keys = (char *)task->keys + cache, *values = (char *)task->values + cache;
    float *output = task->output + (row * task->kv_heads + head) * task->group * dim;
    float scale = task->scale;
    if (task->log_n) scale *= fmaxf(1.0f, logf((float)entries) / logf(task->log_n));
    if (task->new_keys) {
        int64_t last = (entries - 1) * dim;
        write(task->new_keys + row * task->new_key_row + head * dim, keys, last, dim, bfloat16);
        write(task->new_values + row * task->new_value_row + head * dim, values, last, dim, bfloat16);
    }
    int64_t g = 0;
    for (; g + group <= task->group; g += group)
        dot(group, dim, bfloat16, queries + g * dim, keys, entries, weights + g * entries);
    for (; g < task->group; g++) dot(1, dim, bfloat16, queries + g * dim, keys, entries, weights + g * entries);
    for (g = 0; g < task->group; g++) softmax(weights + g * entries, entries, scale);
    for (int64_t s = 0; s < task->states; s++)
        record(&task->state[s], task->layer, row, head, task->group, entries, task->seen[row], weights);
    int d = 0;
    for (; d < dim; d += WIDTH) {
        int width = dim - d < WIDTH ? dim - d : WIDTH;
        for (g = 0; g + group <= task->group; g += group)
            combine(group, width, dim, bfloat16, weights + g * entries, values, d, entries, output + g * dim + d);
        for (; g < task->group; g++)
            combine(1, width, dim, bfloat16, weights + g * entries, values, d, entries, output + g * dim + d);
    }
}

FOR_EACH_PROCESSOR static void work(const Decode *task, int64_t item, float *weights) {
    int64_t row = item / task->kv_heads, at = item % task->kv_heads;
#define CASE(GROUP_, DIM_, BFLOAT16_)                                                             \
    if (group == GROUP_ && task->dim == DIM_ && task->bfloat16 == BFLOAT16_) {                    \
        head(GROUP_, DIM_, BFLOAT16_, task, row, at, weights);                                    \
        return;                                                                                   \
    }
    int64_t group = task->group < GROUP ? task->group : GROUP;
    if (task->group == 6 || task->group == 9) group = 3; /* no remainder */
    CASE(3, 64, 0) CASE(3, 64, 1) CASE(4, 64, 0) CASE(4, 64, 1) CASE(4, 128, 0) CASE(4, 128, 1)
    CASE(2, 64, 0) CASE(2, 128, 0) CASE(1, 64, 0) CASE(1, 128, 0)
#undef CASE
    head((int)group, (int)task->dim, (int)task->bfloat16, task, row, at, weights);
}

/* Returns 0, or 1 where there was no memory for the weights. */
int apiary_attend_decode(const Decode *task) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *weights = malloc(sizeof(float) * task->group * task->longest);
        failed = weights == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < task->rows * task->kv_heads; item++)
            if (!failed) work(task, item, weights);
        free(weights);
    }
    return failed;
}
