/* Entries in 2 or 4 bits, as `buzz/quant.py` writes them, back to float32. */

#pragma once

#include "kernels.h"

enum { CHANNELS = 32 }; /* that share a minimum and a step */

/* A tensor [layers, slots, kv_heads, ...] in any order of the first three, whose strides count elements. */
typedef struct {
    const void *memory;
    int64_t layer, slot, head;
} Part;

typedef struct {
    Part keys, values;           /* uint8 [.., entries, dim * bits / 8]; keys unrotated */
    Part key_grids, value_grids; /* float16 [.., entries, dim / CHANNELS, 2] */
    Part channels;               /* float16 [.., 2, dim]: centre and half range of keys */
    Part positions;              /* int32 [.., entries] */
    const int64_t *counts;       /* [rows]; NULL: nothing is packed */
    const float *turns;          /* [reach, dim]: cosines, then sines, of positions */
    int64_t reach, bits, in_cache; /* in_cache: an entry's index is its position */
} Packed;

/* A float16. It may be no number, which an infinity is taken for: neither is written. */
INLINE float half(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x8000) << 16 | (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &wide, sizeof value);
    return (bits & 0x7c00) == 0x7c00 ? NAN : value * 0x1p112f;
}

INLINE void halves(const uint16_t *restrict from, int64_t count, float *restrict into) {
    for (int64_t i = 0; i < count; i++) into[i] = half(from[i]);
}

/* LANES channels of one entry, from `c` on. A byte has channels that are far apart, so that neighbours are in
   neighbouring bytes. */
INLINE Lanes unpack(const int dim, const int bits, const uint8_t *restrict codes, const float *restrict grid, int c) {
    const int width = dim * bits / 8, shift = c / width * bits;
    float levels[LANES];
    for (int i = 0; i < LANES; i++) levels[i] = (float)(codes[c % width + i] >> shift & ((1 << bits) - 1));
    return *(const Lanes *)levels * grid[c / CHANNELS * 2 + 1] + grid[c / CHANNELS * 2];
}

/* Where a layer, slot and head of a tensor with elements of `size` bytes begin. */
INLINE const void *begin(const Part *part, int64_t layer, int64_t slot, int64_t head, int64_t size) {
    return (const char *)part->memory + (layer * part->layer + slot * part->slot + head * part->head) * size;
}

INLINE void values_of(const int dim, const int bits, const Packed *packed, int64_t layer, int64_t slot, int64_t head,
                      int64_t first, int64_t count, float *restrict grids, float *restrict into) {
    const int width = dim * bits / 8, grid = dim / CHANNELS * 2;
    const uint8_t *codes = (const uint8_t *)begin(&packed->values, layer, slot, head, 1) + first * width;
    halves((const uint16_t *)begin(&packed->value_grids, layer, slot, head, 2) + first * grid, count * grid, grids);
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int c = 0; c < dim; c += LANES)
            *(Lanes *)(into + j * dim + c) = unpack(dim, bits, codes + j * width, grids + j * grid, c);
}

INLINE void keys_of(const int dim, const int bits, const Packed *packed, int64_t layer, int64_t slot, int64_t head,
                    int64_t first, int64_t count, float *restrict grids, float *restrict into) {
    const int width = dim * bits / 8, grid = dim / CHANNELS * 2, rotated = dim / 2;
    const uint8_t *codes = (const uint8_t *)begin(&packed->keys, layer, slot, head, 1) + first * width;
    const int32_t *positions = (const int32_t *)begin(&packed->positions, layer, slot, head, 4) + first;
    halves((const uint16_t *)begin(&packed->key_grids, layer, slot, head, 2) + first * grid, count * grid, grids);
    float *channels = grids + count * grid;
    halves(begin(&packed->channels, layer, slot, head, 2), 2 * dim, channels);
#define AT(FLOATS) (*(const Lanes *)(FLOATS))
    for (int64_t j = 0; j < count; j++) {
        uint64_t at = packed->in_cache ? (uint64_t)(first + j) : (uint32_t)positions[j];
        const float *turn = packed->turns + (at < (uint64_t)packed->reach ? at : 0) * dim;
#pragma GCC unroll 8
        for (int c = 0; c < rotated; c += LANES) {
            Lanes left = unpack(dim, bits, codes + j * width, grids + j * grid, c);
            Lanes right = unpack(dim, bits, codes + j * width, grids + j * grid, rotated + c);
            left = left * AT(channels + dim + c) + AT(channels + c);
            right = right * AT(channels + dim + rotated + c) + AT(channels + rotated + c);
            Lanes cosine = AT(turn + c), sine = AT(turn + rotated + c);
            *(Lanes *)(into + j * dim + c) = left * cosine - right * sine;
            *(Lanes *)(into + j * dim + rotated + c) = right * cosine + left * sine;
        }
    }
#undef AT
}

/* Calls DO for constants where they are known. */
#define PACKING(DIM_, BITS_, DO, ...) if (dim == DIM_ && packed->bits == BITS_) DO(DIM_, BITS_, packed, __VA_ARGS__); else
#define BY_PACKING(DO, ...)                                                       \
    PACKING(64, 4, DO, __VA_ARGS__) PACKING(128, 4, DO, __VA_ARGS__)              \
    PACKING(64, 2, DO, __VA_ARGS__) PACKING(128, 2, DO, __VA_ARGS__)              \
    DO((int)dim, (int)packed->bits, packed, __VA_ARGS__)

/* Values [first, first + count) of a head into float [count, dim]; `room` is as large, and at least float [4, dim]. */
FOR_EACH_PROCESSOR static void unpack_values(int64_t dim, const Packed *packed, int64_t layer, int64_t slot, int64_t head,
                                             int64_t first, int64_t count, float *room, float *into) {
    BY_PACKING(values_of, layer, slot, head, first, count, room, into);
}

/* The same of keys, rotated. */
FOR_EACH_PROCESSOR static void unpack_keys(int64_t dim, const Packed *packed, int64_t layer, int64_t slot, int64_t head,
                                           int64_t first, int64_t count, float *room, float *into) {
    BY_PACKING(keys_of, layer, slot, head, first, count, room, into);
}
