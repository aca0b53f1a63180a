/* Attention over entries in floats, or in what becomes floats as it is read. */

#pragma once

#include "stream.h"

enum { KEYS = 4, PARTS = 4 };

typedef float Quad __attribute__((vector_size(KEYS * 4), aligned(4), may_alias));

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
INLINE void dot(const int group, const int dim, const int type, const float *restrict queries,
                const void *restrict keys, Stream stream, int64_t entries, float *restrict weights, int64_t stride) {
    const int wide = dim / LANES * LANES, size = size_of(type);
    int64_t j = 0;
    for (; j + KEYS <= entries; j += KEYS) {
        Lanes sums[GROUP][KEYS] = {0};
        ahead(stream, (const char *)keys + j * dim * size, KEYS * dim * size);
#pragma GCC unroll 8
        for (int d = 0; d < wide; d += LANES) {
            Lanes key[KEYS];
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; k++) key[k] = elements(keys, (j + k) * dim + d, type);
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
            for (int d = first; d < dim; d++) sum += queries[g * dim + d] * element(keys, i * dim + d, type);
            weights[g * stride + i] = sum;
        }
    }
}

/* output[g, :parts * LANES] += sum over j of weights[g, j] * values[j, first : first + parts * LANES] */
INLINE void combine(const int group, const int parts, const int dim, const int type, const float *restrict weights,
                    int64_t stride, const void *restrict values, Stream stream, int64_t first, int64_t entries,
                    float *restrict output) {
    const int size = (int)size_of(type);
    Lanes sums[GROUP][PARTS] = {0};
    for (int64_t j = 0; j < entries; j++) {
        ahead(stream, (const char *)values + (j * dim + first) * size, parts * LANES * size);
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) {
            Lanes value = elements(values, j * dim + first + p * LANES, type);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) sums[g][p] += weights[g * stride + j] * value;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) *(Lanes *)(output + g * dim + p * LANES) += sums[g][p];
}

/* Calls DO for constants where they are known. */
#define SHAPE(GROUP_, DIM_, TYPE_, DO, ...)                                                            \
    if (group == GROUP_ && dim == DIM_ && type == TYPE_) DO(GROUP_, DIM_, TYPE_, __VA_ARGS__); else
#define SHAPES(GROUP_, DIM_, DO, ...)           \
    SHAPE(GROUP_, DIM_, FLOAT32, DO, __VA_ARGS__)  \
    SHAPE(GROUP_, DIM_, BFLOAT16, DO, __VA_ARGS__) \
    SHAPE(GROUP_, DIM_, INT8, DO, __VA_ARGS__)
#define BY_SHAPE(DO, ...)                                                                                  \
    SHAPES(3, 64, DO, __VA_ARGS__) SHAPES(4, 64, DO, __VA_ARGS__) SHAPES(4, 128, DO, __VA_ARGS__)          \
    SHAPE(2, 64, FLOAT32, DO, __VA_ARGS__) SHAPE(2, 128, FLOAT32, DO, __VA_ARGS__)                         \
    SHAPE(1, 64, FLOAT32, DO, __VA_ARGS__) SHAPE(1, 128, FLOAT32, DO, __VA_ARGS__)                         \
    DO(group, (int)dim, (int)type, __VA_ARGS__)

INLINE void dots_of(const int group, const int dim, const int type, int64_t heads, const float *queries,
                    const void *keys, Stream stream, int64_t entries, float *weights, int64_t stride) {
    int64_t g = 0;
    for (; g + group <= heads; g += group)
        dot(group, dim, type, queries + g * dim, keys, stream, entries, weights + g * stride, stride);
    for (; g < heads; g++) dot(1, dim, type, queries + g * dim, keys, stream, entries, weights + g * stride, stride);
}

INLINE void combine_of(const int group, const int dim, const int type, int64_t heads, const float *weights,
                       int64_t stride, const void *values, Stream stream, int64_t entries, float *output) {
    for (int d = 0, parts; d + LANES <= dim; d += parts * LANES) {
        parts = dim - d < PARTS * LANES ? (dim - d) / LANES : PARTS;
        int64_t g = 0;
        for (; g + group <= heads; g += group)
            combine(group, parts, dim, type, weights + g * stride, stride, values, stream, d, entries, output + g * dim + d);
        for (; g < heads; g++)
            combine(1, parts, dim, type, weights + g * stride, stride, values, stream, d, entries, output + g * dim + d);
    }
}

/* `dot` of all heads that share the keys. */
FOR_EACH_PROCESSOR static void dots(int64_t heads, int64_t dim, int64_t type, const float *queries,
                                    const void *keys, Stream stream, int64_t entries, float *weights,
                                    int64_t stride) {
    const int group = together(heads);
    BY_SHAPE(dots_of, heads, queries, keys, stream, entries, weights, stride);
}

/* `combine` of all heads that share the values, in the channels that are whole vectors. */
FOR_EACH_PROCESSOR static void combines(int64_t heads, int64_t dim, int64_t type, const float *weights,
                                        int64_t stride, const void *values, Stream stream, int64_t entries,
                                        float *output) {
    const int group = together(heads);
    BY_SHAPE(combine_of, heads, weights, stride, values, stream, entries, output);
}
