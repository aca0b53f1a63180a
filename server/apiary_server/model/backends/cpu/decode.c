/* Attention of one new token in each of many sessions, one pass over each cache where it lies.

   Every pair of a row and a KV head is one piece of work: logits, softmax, what policies record, and the
   weighted sum of values, while the head's entries are in the processor's cache. Entries in few bits come first, and
   are unpacked a tile at a time. The result depends on nothing outside of its row. Threads are OpenMP's; the symbols
   come from the library that torch has loaded, so that both share one pool of threads. */

#include "bytes.h"
#include "floats.h"
#include "kernels.h"
#include "packed.h"

#include <stdlib.h>

#define LEAST_SCALE 1e-12f

enum { TILE = 32, ROOM = 2 * TILE };

/* The caches of a step, the same in all layers. Strides count elements. The last dimension of all tensors is
   contiguous. */
typedef struct {
    int64_t kv_heads, dim, type, states;
    void *keys, *values; /* [layers, slots, kv_heads, entries, dim], in any order of the first three */
    int64_t cache_layer, cache_slot, cache_head;
    float *key_scales, *value_scales; /* [layers, slots, kv_heads, entries], of entries in eight bits */
    int64_t scale_layer, scale_slot, scale_head;
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

/* A new entry; returns its scale, where it has one, as `buzz.eight_bits` says. */
INLINE float write(const float *restrict from, void *restrict memory, int64_t dim, int type) {
    float largest = 0, sum = 0;
    switch (type) {
    case FLOAT32: memcpy(memory, from, dim * sizeof *from); break;
    case BFLOAT16:
        for (int64_t d = 0; d < dim; d++) {
            uint32_t bits;
            memcpy(&bits, &from[d], sizeof bits);
            uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* even where it is a tie */
            ((uint16_t *)memory)[d] = (uint16_t)(from[d] != from[d] ? bits >> 16 | 0x40 : nearest);
        }
        break;
    default:
        for (int64_t d = 0; d < dim; d++) {
            float size = fabsf(from[d]);
            largest = size > largest ? size : largest;
            sum += size * 0; /* NaN where one is not finite */
        }
        largest = (largest > LEAST_SCALE * 127 ? largest : LEAST_SCALE * 127) + sum;
        float inverse = 127 / largest;
        for (int64_t d = 0; d < dim; d++) ((int8_t *)memory)[d] = sum == 0 ? (int8_t)rintf(from[d] * inverse) : 0;
    }
    return largest * (1.0f / 127);
}

/* Where a state of a head's entries begins; elements have four bytes. */
INLINE void *begins(const State *state, int64_t layer, int64_t slot, int64_t head) {
    return (int32_t *)state->into + layer * state->layer + slot * state->slot + head * state->head;
}

/* One query head after the other: so the loops are vectorised. */
INLINE void record(const State *state, int64_t layer, int64_t slot, int64_t head, int64_t group, int64_t entries, int64_t seen,
                   const float *restrict weights) {
    if (state->votes) {
        int32_t *restrict last = begins(state, layer, slot, head), now = (int32_t)seen;
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < entries; j++)
                last[j] = weights[g * entries + j] * (float)entries >= 1.0f ? now : last[j];
    } else {
        float *restrict mass = begins(state, layer, slot, head);
        for (int64_t j = 0; j < entries; j++) mass[j] *= state->decay;
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < entries; j++) mass[j] += weights[g * entries + j];
    }
}

/* weights[g, j] *= scales[j] */
INLINE void scaled(int64_t group, int64_t entries, const float *restrict scales, float *restrict weights, int64_t stride) {
    for (int64_t g = 0; g < group; g++)
        for (int64_t j = 0; j < entries; j++) weights[g * stride + j] *= scales[j];
}

/* Where the cache of a piece of work begins, in bytes. */
INLINE int64_t place(const Decode *task, int64_t item) {
    const Run *run = task->run;
    int64_t row = item / run->kv_heads, head = item % run->kv_heads;
    return (task->layer * run->cache_layer + run->slots[row] * run->cache_slot + head * run->cache_head) *
           size_of((int)run->type);
}

/* One KV head of one row. `room` is for ROOM * dim floats, `digits` for `bytes_room`, NULL where these do not fit. */
FOR_EACH_PROCESSOR static void work(const Decode *task, int64_t item, float *restrict weights, float *restrict room,
                                    void *restrict digits) {
    const Run *run = task->run;
    int64_t row = item / run->kv_heads, head = item % run->kv_heads, layer = task->layer, group = task->group;
    int64_t slot = run->slots[row];
    int64_t dim = run->dim, type = run->type, size = size_of(type);
    int64_t entries = run->lengths[row], packed = run->packed.counts ? run->packed.counts[row] : 0;
    int64_t dense = entries - packed;
    int64_t cache = place(task, item);
    const float *queries = task->queries + row * task->query_row + head * group * dim;
    char *keys = (char *)run->keys + cache, *values = (char *)run->values + cache;
    int64_t next = item + 1 < task->rows * run->kv_heads ? place(task, item + 1) : cache;
    Stream of_keys = {keys + dense * dim * size, values}, here = {(char *)room + TILE * dim * 4, (char *)room};
    Stream of_values = {values + dense * dim * size, (char *)run->keys + next};
    float *output = task->output + (row * run->kv_heads + head) * group * dim, scale = task->scale;
    if (run->log_n) scale *= fmaxf(1.0f, logf((float)entries) / logf(run->log_n));
    int64_t last = (dense - 1) * dim * size, scales = layer * run->scale_layer + slot * run->scale_slot + head * run->scale_head;
    float *key_scales = type == INT8 ? run->key_scales + scales : NULL;
    float *value_scales = type == INT8 ? run->value_scales + scales : NULL;
    float key_scale = write(task->new_keys + row * task->new_key_row + head * dim, keys + last, dim, (int)type);
    float value_scale = write(task->new_values + row * task->new_value_row + head * dim, values + last, dim, (int)type);
    if (type == INT8) {
        key_scales[dense - 1] = key_scale;
        value_scales[dense - 1] = value_scale;
    }
    for (int64_t s = 0; s < run->states; s++) fetch(begins(&run->state[s], layer, slot, head), entries * 4);
    if (type == INT8) {
        fetch(key_scales, dense * 4);
        fetch(value_scales, dense * 4);
    }
    for (int64_t first = 0, count; first < packed; first += count) {
        count = packed - first < TILE ? packed - first : TILE;
        unpack_keys(dim, &run->packed, layer, slot, head, first, count, room + TILE * dim, room);
        dots(group, dim, FLOAT32, queries, room, here, count, weights + first, entries);
    }
    if (digits)
        byte_dots(group, dim, queries, (int8_t *)keys, of_keys, key_scales, dense, weights + packed, entries, digits);
    else {
        dots(group, dim, type, queries, keys, of_keys, dense, weights + packed, entries);
        if (type == INT8) scaled(group, dense, key_scales, weights + packed, entries);
    }
    for (int64_t g = 0; g < group; g++) softmax(weights + g * entries, entries, scale);
    for (int64_t s = 0; s < run->states; s++)
        record(&run->state[s], layer, slot, head, group, entries, run->seen[row], weights);
    memset(output, 0, group * dim * sizeof *output);
    for (int64_t first = 0, count; first < packed; first += count) {
        count = packed - first < TILE ? packed - first : TILE;
        unpack_values(dim, &run->packed, layer, slot, head, first, count, room + TILE * dim, room);
        combines(group, dim, FLOAT32, weights + first, entries, room, here, count, output);
    }
    if (digits) {
        byte_combines(group, dim, weights + packed, entries, (int8_t *)values, of_values, value_scales, dense, output, digits);
        return;
    }
    if (type == INT8) scaled(group, dense, value_scales, weights + packed, entries);
    combines(group, dim, type, weights + packed, entries, values, of_values, dense, output);
    narrow_sums(group, (int)type, dense, dim, weights, entries, values, dim / LANES * LANES, output);
}

/* Returns 0, or 1 where there was no memory for the weights. */
int apiary_attend_decode(const Decode *task) {
    const Run *run = task->run;
    int bytes = run->type == INT8 && bytes_fit(run->dim);
    float *weights = malloc(sizeof(float) * task->group * run->longest);
    float *room = malloc(sizeof(float) * ROOM * run->dim);
    void *digits = bytes ? malloc(bytes_room(run->dim, run->longest)) : NULL;
    int failed = weights == NULL || room == NULL || (bytes && digits == NULL);
#pragma omp for schedule(guided) nowait /* items in a row, so that the next one is known */
    for (int64_t item = 0; item < task->rows * run->kv_heads; item++)
        if (!failed) work(task, item, weights, room, digits);
    free(weights);
    free(room);
    free(digits);
    return failed;
}
