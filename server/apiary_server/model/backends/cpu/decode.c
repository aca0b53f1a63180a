/* Attention of one new token in each of many sessions, one pass over each cache where it lies.

   Every pair of a row and a KV head is one piece of work: logits, softmax, what policies record, and the
   weighted sum of values, while the head's entries are in the processor's cache. Entries in few bits come first, and
   are unpacked a tile at a time. The result depends on nothing outside of its row. Threads are OpenMP's; the symbols come from the library that torch has
   loaded, so that both share one pool of threads. */

#include "kernels.h"
#include "packed.h"

#include <stdlib.h>

enum { GROUP = 4, KEYS = 4, PARTS = 4, LINE = 64, AHEAD = 4096, TILE = 32, ROOM = 2 * TILE };

typedef float Quad __attribute__((vector_size(KEYS * 4), aligned(4), may_alias));

/* The caches of a step, the same in all layers. Strides count elements. The last dimension of all tensors is
   contiguous. */
typedef struct {
    int64_t kv_heads, dim, bfloat16, states;
    void *keys, *values; /* [layers, slots, kv_heads, entries, dim], in any order of the first three */
    int64_t cache_layer, cache_slot, cache_head;
    const int64_t *slots;   /* [rows]: where a row's entries are, here and in `state` and `packed` */
    const int64_t *lengths; /* [rows]: entries, the packed ones, which are not in `keys`, included */
    const int64_t *seen;    /* [rows] */
    int64_t longest;
    float log_n; /* 0: none */
    State state[MOST_STATES];
    Packed packed;
} Run;

/* A layer of a step. */
typedef struct {
    int64_t rows;
    const Run *run;
    int64_t layer, group;
    const float *queries; /* [rows, kv_heads * group, dim] */
    int64_t query_row;
    const float *new_keys, *new_values; /* [rows, kv_heads, dim]: to be written as the last entries */
    int64_t new_key_row, new_value_row;
    float *output; /* [rows, kv_heads * group, dim], contiguous */
    float scale;
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

/* Asks memory for `bytes` of what is read soon. */
INLINE void ahead(const void *memory, int64_t at, int bytes) {
    for (int byte = 0; byte < bytes; byte += LINE) __builtin_prefetch((const char *)memory + at + byte + AHEAD, 0, 3);
}

/* The sum of each vector's lanes: pairs are added, until four lanes belong to four vectors. */
INLINE Quad across(const Lanes *of) {
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
    Lanes low = EVEN(of[0], of[1]) + ODD(of[0], of[1]), high = EVEN(of[2], of[3]) + ODD(of[2], of[3]);
    Lanes all = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#undef EVEN
#undef ODD
    return (__builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7)) +
           (__builtin_shufflevector(all, all, 8, 9, 10, 11) + __builtin_shufflevector(all, all, 12, 13, 14, 15));
}

/* weights[g, j] = queries[g] . keys[j], for `group` heads that share the keys; weights [group, stride] */
INLINE void dot(const int group, const int dim, const int bfloat16, const float *restrict queries,
                const void *restrict keys, int64_t entries, float *restrict weights, int64_t stride) {
    const int wide = dim / LANES * LANES, size = bfloat16 ? 2 : 4;
    int64_t j = 0;
    for (; j + KEYS <= entries; j += KEYS) {
        Lanes sums[GROUP][KEYS] = {0};
        ahead(keys, j * dim * size, KEYS * dim * size);
#pragma GCC unroll 8
        for (int d = 0; d < wide; d += LANES) {
            Lanes key[KEYS];
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; k++) key[k] = elements(keys, (j + k) * dim + d, bfloat16);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++)
#pragma GCC unroll 4
                for (int k = 0; k < KEYS; k++) sums[g][k] += *(const Lanes *)(queries + g * dim + d) * key[k];
        }
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) *(Quad *)(weights + g * stride + j) = across(sums[g]);
    }
    for (int64_t i = wide < dim ? 0 : j; i < entries; i++) { /* the last channels of all keys, all of the last keys */
        int first = i < j ? wide : 0;
        for (int g = 0; g < group; g++) {
            float sum = first ? weights[g * stride + i] : 0;
            for (int d = first; d < dim; d++) sum += queries[g * dim + d] * element(keys, i * dim + d, bfloat16);
            weights[g * stride + i] = sum;
        }
    }
}

/* output[g, :parts * LANES] += sum over j of weights[g, j] * values[j, first : first + parts * LANES] */
INLINE void combine(const int group, const int parts, const int dim, const int bfloat16, const float *restrict weights,
                    int64_t stride, const void *restrict values, int64_t first, int64_t entries,
                    float *restrict output) {
    const int size = bfloat16 ? 2 : 4;
    Lanes sums[GROUP][PARTS] = {0};
    for (int64_t j = 0; j < entries; j++) {
        ahead(values, (j * dim + first) * size, parts * LANES * size);
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) {
            Lanes value = elements(values, j * dim + first + p * LANES, bfloat16);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) sums[g][p] += weights[g * stride + j] * value;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) *(Lanes *)(output + g * dim + p * LANES) += sums[g][p];
}

/* One query head after the other: so the loops are vectorised. */
INLINE void record(const State *state, int64_t layer, int64_t slot, int64_t head, int64_t group, int64_t entries, int64_t seen,
                   const float *restrict weights) {
    int64_t at = layer * state->layer + slot * state->slot + head * state->head;
    if (state->votes) {
        int32_t *restrict last = (int32_t *)state->into + at, now = (int32_t)seen;
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < entries; j++)
                last[j] = weights[g * entries + j] * (float)entries >= 1.0f ? now : last[j];
    } else {
        float *restrict mass = (float *)state->into + at;
        for (int64_t j = 0; j < entries; j++) mass[j] *= state->decay;
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < entries; j++) mass[j] += weights[g * entries + j];
    }
}

/* Calls DO for constants where they are known. */
#define SHAPE(GROUP_, DIM_, BFLOAT16_, DO, ...)                                                            \
    if (group == GROUP_ && dim == DIM_ && bfloat16 == BFLOAT16_) DO(GROUP_, DIM_, BFLOAT16_, __VA_ARGS__); else
#define BY_SHAPE(DO, ...)                                                                                  \
    SHAPE(3, 64, 0, DO, __VA_ARGS__) SHAPE(3, 64, 1, DO, __VA_ARGS__) SHAPE(4, 64, 0, DO, __VA_ARGS__)     \
    SHAPE(4, 64, 1, DO, __VA_ARGS__) SHAPE(4, 128, 0, DO, __VA_ARGS__) SHAPE(4, 128, 1, DO, __VA_ARGS__)   \
    SHAPE(2, 64, 0, DO, __VA_ARGS__) SHAPE(2, 128, 0, DO, __VA_ARGS__) SHAPE(1, 64, 0, DO, __VA_ARGS__)    \
    SHAPE(1, 128, 0, DO, __VA_ARGS__)                                                                      \
    DO(group, (int)dim, (int)bfloat16, __VA_ARGS__)

INLINE void dots_of(const int group, const int dim, const int bfloat16, int64_t heads, const float *queries,
                    const void *keys, int64_t entries, float *weights, int64_t stride) {
    int64_t g = 0;
    for (; g + group <= heads; g += group)
        dot(group, dim, bfloat16, queries + g * dim, keys, entries, weights + g * stride, stride);
    for (; g < heads; g++) dot(1, dim, bfloat16, queries + g * dim, keys, entries, weights + g * stride, stride);
}

INLINE void combine_of(const int group, const int dim, const int bfloat16, int64_t heads, const float *weights,
                       int64_t stride, const void *values, int64_t entries, float *output) {
    for (int d = 0, parts; d + LANES <= dim; d += parts * LANES) {
        parts = dim - d < PARTS * LANES ? (dim - d) / LANES : PARTS;
        int64_t g = 0;
        for (; g + group <= heads; g += group)
            combine(group, parts, dim, bfloat16, weights + g * stride, stride, values, d, entries, output + g * dim + d);
        for (; g < heads; g++)
            combine(1, parts, dim, bfloat16, weights + g * stride, stride, values, d, entries, output + g * dim + d);
    }
}

/* How many query heads are computed together. */
INLINE int together(int64_t heads) {
    if (heads == 6 || heads == 9) return 3; /* no remainder */
    return heads < GROUP ? (int)heads : GROUP;
}

/* `dot` of all heads that share the keys. */
FOR_EACH_PROCESSOR static void dots(int64_t heads, int64_t dim, int64_t bfloat16, const float *queries,
                                    const void *keys, int64_t entries, float *weights, int64_t stride) {
    const int group = together(heads);
    BY_SHAPE(dots_of, heads, queries, keys, entries, weights, stride);
}

/* `combine` of all heads that share the values, in the channels that are whole vectors. */
FOR_EACH_PROCESSOR static void combines(int64_t heads, int64_t dim, int64_t bfloat16, const float *weights,
                                        int64_t stride, const void *values, int64_t entries, float *output) {
    const int group = together(heads);
    BY_SHAPE(combine_of, heads, weights, stride, values, entries, output);
}

/* One KV head of one row. `room` is for ROOM * dim floats. */
FOR_EACH_PROCESSOR static void work(const Decode *task, int64_t item, float *restrict weights, float *restrict room) {
    const Run *run = task->run;
    int64_t row = item / run->kv_heads, head = item % run->kv_heads, layer = task->layer, group = task->group;
    int64_t slot = run->slots[row];
    int64_t dim = run->dim, bfloat16 = run->bfloat16, size = bfloat16 ? 2 : 4;
    int64_t entries = run->lengths[row], packed = run->packed.counts ? run->packed.counts[row] : 0;
    int64_t dense = entries - packed;
    int64_t cache = (layer * run->cache_layer + slot * run->cache_slot + head * run->cache_head) * size;
    const float *queries = task->queries + row * task->query_row + head * group * dim;
    char *keys = (char *)run->keys + cache, *values = (char *)run->values + cache;
    float *output = task->output + (row * run->kv_heads + head) * group * dim, scale = task->scale;
    if (run->log_n) scale *= fmaxf(1.0f, logf((float)entries) / logf(run->log_n));
    write(task->new_keys + row * task->new_key_row + head * dim, keys, (dense - 1) * dim, dim, (int)bfloat16);
    write(task->new_values + row * task->new_value_row + head * dim, values, (dense - 1) * dim, dim, (int)bfloat16);
    for (int64_t first = 0, count; first < packed; first += count) {
        count = packed - first < TILE ? packed - first : TILE;
        unpack_keys(dim, &run->packed, layer, slot, head, first, count, room + TILE * dim, room);
        dots(group, dim, 0, queries, room, count, weights + first, entries);
    }
    dots(group, dim, bfloat16, queries, keys, dense, weights + packed, entries);
    for (int64_t g = 0; g < group; g++) softmax(weights + g * entries, entries, scale);
    for (int64_t s = 0; s < run->states; s++)
        record(&run->state[s], layer, slot, head, group, entries, run->seen[row], weights);
    memset(output, 0, group * dim * sizeof *output);
    for (int64_t first = 0, count; first < packed; first += count) {
        count = packed - first < TILE ? packed - first : TILE;
        unpack_values(dim, &run->packed, layer, slot, head, first, count, room + TILE * dim, room);
        combines(group, dim, 0, weights + first, entries, room, count, output);
    }
    combines(group, dim, bfloat16, weights + packed, entries, values, dense, output);
    narrow_sums(group, (int)bfloat16, dense, dim, weights, entries, values, dim / LANES * LANES, output);
}

/* Returns 0, or 1 where there was no memory for the weights. */
int apiary_attend_decode(const Decode *task) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *weights = malloc(sizeof(float) * task->group * task->run->longest);
        float *room = malloc(sizeof(float) * ROOM * task->run->dim);
        failed = weights == NULL || room == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < task->rows * task->run->kv_heads; item++)
            if (!failed) work(task, item, weights, room);
        free(weights);
        free(room);
    }
    return failed;
}
