/* Entries in 2 or 4 bits, as `buzz/quant.py` writes them, back to float32. */

enum { CHANNELS = 32 }; /* that share a minimum and a step */

/* A tensor [layers, rows, kv_heads, ...] in any order of the first three, whose strides count elements. */
typedef struct {
    const void *memory;
    int64_t layer, row, head;
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

/* Minima and steps, which are finite. */
INLINE float half(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x8000) << 16 | (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value * 0x1p112f;
}

/* One entry. A byte has channels that are far apart, so that a run of bytes has a run of channels. */
INLINE void unpack(const int dim, const int bits, const int run, const uint8_t *restrict codes,
                   const uint16_t *restrict grid, float *restrict into) {
    const int width = dim * bits / 8;
    for (int c = 0; c < dim; c += run) {
        const uint8_t *some = codes + c % width;
        const int shift = c / width * bits;
        float low = half(grid[c / CHANNELS * 2]), step = half(grid[c / CHANNELS * 2 + 1]);
        for (int i = 0; i < run; i++) into[c + i] = (float)(some[i] >> shift & ((1 << bits) - 1)) * step + low;
    }
}

INLINE void unpack_all(const int dim, const int bits, const uint8_t *codes, const uint16_t *grids, int64_t count,
                       float *into) {
    const int width = dim * bits / 8;
    for (int64_t j = 0; j < count; j++) {
        const uint8_t *some = codes + j * width;
        const uint16_t *grid = grids + j * (dim / CHANNELS * 2);
        if (width % 32 == 0)
            unpack(dim, bits, 32, some, grid, into + j * dim);
        else if (width % 16 == 0)
            unpack(dim, bits, 16, some, grid, into + j * dim);
        else
            unpack(dim, bits, 8, some, grid, into + j * dim);
    }
}

/* Where a layer, row and head of a tensor with elements of `size` bytes begin. */
INLINE const char *begin(const Part *part, int64_t layer, int64_t row, int64_t head, int64_t size) {
    return (const char *)part->memory + (layer * part->layer + row * part->row + head * part->head) * size;
}

INLINE void unpack_values(const int dim, const int bits, const Packed *packed, int64_t layer, int64_t row, int64_t head,
                          int64_t first, int64_t count, float *restrict into) {
    const uint8_t *codes = (const uint8_t *)begin(&packed->values, layer, row, head, 1);
    const uint16_t *grids = (const uint16_t *)begin(&packed->value_grids, layer, row, head, 2);
    unpack_all(dim, bits, codes + first * (dim * bits / 8), grids + first * (dim / CHANNELS * 2), count, into);
}

/* A head's `channels`, as floats. */
INLINE void unpack_channels(const int dim, const Packed *packed, int64_t layer, int64_t row, int64_t head,
                            float *restrict into) {
    const uint16_t *channels = (const uint16_t *)begin(&packed->channels, layer, row, head, 2);
    for (int c = 0; c < 2 * dim; c++) into[c] = half(channels[c]);
}

/* Keys, rotated. `channels` is what `unpack_channels` found. */
INLINE void unpack_keys(const int dim, const int bits, const Packed *packed, int64_t layer, int64_t row, int64_t head,
                        int64_t first, int64_t count, const float *restrict channels, float *restrict into) {
    const uint8_t *codes = (const uint8_t *)begin(&packed->keys, layer, row, head, 1);
    const uint16_t *grids = (const uint16_t *)begin(&packed->key_grids, layer, row, head, 2);
    const int32_t *positions = (const int32_t *)begin(&packed->positions, layer, row, head, 4);
    const int rotated = dim / 2;
    unpack_all(dim, bits, codes + first * (dim * bits / 8), grids + first * (dim / CHANNELS * 2), count, into);
    for (int64_t j = 0; j < count; j++) {
        float *restrict key = into + j * dim;
        uint64_t at = packed->in_cache ? (uint64_t)(first + j) : (uint32_t)positions[first + j];
        const float *restrict turn = packed->turns + (at < (uint64_t)packed->reach ? at : 0) * dim;
        for (int c = 0; c < rotated; c++) {
            float left = key[c] * channels[dim + c] + channels[c];
            float right = key[rotated + c] * channels[dim + rotated + c] + channels[rotated + c];
            key[c] = left * turn[c] - right * turn[rotated + c];
            key[rotated + c] = right * turn[c] + left * turn[rotated + c];
        }
    }
}
