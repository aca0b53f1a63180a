/* What all kernels share. */

#pragma once

#include "lanes.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

enum { LEAST = -126, MOST = 127 }; /* exponents of normal numbers */

/* 2^x for x of at most MOST, LEAST at the least: Cephes' polynomial of what is left of the exponent, to 2 units in
   the last place. */
INLINE float power_of_2(float x) {
    x = x < LEAST ? LEAST : x;
    float whole = floorf(x), part = x - whole, power = 1.535336188e-4f;
    power = power * part + 1.339887440e-3f;
    power = power * part + 9.618437358e-3f;
    power = power * part + 5.550332472e-2f;
    power = power * part + 2.402264791e-1f;
    power = power * part + 6.931472029e-1f;
    power = power * part + 1.0f;
    int32_t bits; /* of 2^part, to whose exponent the rest is added */
    memcpy(&bits, &power, sizeof bits);
    bits += (int32_t)whole * (1 << 23);
    memcpy(&power, &bits, sizeof power);
    return power;
}

#define LOG2_E 1.44269504f

INLINE float exponential(float x) {
    x *= LOG2_E;
    return power_of_2(x > MOST ? MOST : x);
}

enum { MOST_STATES = 2 };

typedef struct {
    void *into; /* [.., kv_heads, entries]: float masses, or int32 votes */
    int64_t layer, slot, head; /* strides */
    int64_t votes;
    float decay;
} State;

/* What the entries of a cache are. Those of eight bits are whole numbers, which a scale for each entry belongs to. */
enum { FLOAT32, BFLOAT16, INT8 };

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

INLINE float element(const void *memory, int64_t at, int type) {
    if (type == FLOAT32) return ((const float *)memory)[at];
    if (type == INT8) return ((const int8_t *)memory)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)memory)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* LANES elements, the first of them at `at`. */
INLINE Lanes elements(const void *memory, int64_t at, int type) {
    typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
    typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
    if (type == FLOAT32) return *(const Lanes *)((const float *)memory + at);
    if (type == INT8) { /* twice as wide each time: of one step compilers make one for each byte */
        Shorts shorts = __builtin_convertvector(*(const Bytes *)((const int8_t *)memory + at), Shorts);
        return __builtin_convertvector(__builtin_convertvector(shorts, Integers), Lanes);
    }
    return (Lanes)(__builtin_convertvector(*(const Halves *)((const uint16_t *)memory + at), Bits) << 16);
}

/* output[v, first:dim] = sum of weights[v, j] * values[j, first:dim] over j before `view`: for the channels that
   LANES does not divide. */
INLINE void narrow_sums(int64_t vectors, int type, int64_t view, int64_t dim, const float *weights, int64_t stride,
                        const void *values, int64_t first, float *restrict output) {
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t d = first; d < dim; d++) {
            float sum = 0;
            for (int64_t j = 0; j < view; j++) sum += weights[v * stride + j] * element(values, j * dim + d, type);
            output[v * dim + d] = sum;
        }
}

/* Compilers do not vectorise a maximum of floats by themselves, since NaN makes its order matter. */
INLINE float largest(const float *restrict values, int64_t count) {
    enum { SIDE_BY_SIDE = 64 };
    float most[SIDE_BY_SIDE], result = values[0];
    int64_t j = 0;
    for (int i = 0; i < SIDE_BY_SIDE; i++) most[i] = result;
    for (; j + SIDE_BY_SIDE <= count; j += SIDE_BY_SIDE)
        for (int i = 0; i < SIDE_BY_SIDE; i++) most[i] = values[j + i] > most[i] ? values[j + i] : most[i];
    for (; j < count; j++) result = values[j] > result ? values[j] : result;
    for (int i = 0; i < SIDE_BY_SIDE; i++) result = most[i] > result ? most[i] : result;
    return result;
}

/* Softmax but for a factor, which it returns. */
INLINE float exponentials(float *restrict logits, int64_t entries, float scale) {
    scale *= LOG2_E;
    float most = largest(logits, entries) * scale, sum = 0;
    for (int64_t j = 0; j < entries; j++) {
        logits[j] = power_of_2(logits[j] * scale - most);
        sum += logits[j];
    }
    return 1.0f / sum;
}

INLINE void softmax(float *restrict logits, int64_t entries, float scale) {
    float factor = exponentials(logits, entries, scale);
    for (int64_t j = 0; j < entries; j++) logits[j] *= factor;
}
