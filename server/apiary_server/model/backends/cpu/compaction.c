/* What a compaction takes time for: the lengths of values, the choice of a honeycomb, and moving the entries that
   stay to the front, in their memory or in other. */

#include "kernels.h"

typedef struct {
    int64_t rows; /* layers */
    int64_t heads, entries, dim, type;
    const void *values;
    int64_t layer, head; /* strides */
    const float *scales; /* of INT8 */
    int64_t scale_layer, scale_head;
    float *output; /* [layers, heads, entries], contiguous */
} Norms;

typedef struct {
    int64_t rows, entries, hot, cells;
    const float *score; /* [rows, entries], contiguous */
    uint32_t *ranks;    /* [rows, entries], for the work */
    int64_t *kept;      /* [rows, hot + cells] */
} Honeycomb;

typedef struct {
    int64_t rows; /* layers */
    int64_t heads, kept;
    int64_t bytes; /* of an entry */
    const char *source;
    int64_t source_layer, source_head; /* strides, bytes */
    char *target;                      /* the same memory, or some that does not overlap it */
    int64_t target_layer, target_head;
    const int64_t *index; /* [layers, heads, kept], contiguous: which stay, ascending */
} Keep;

INLINE float squares(const void *values, int64_t at, int64_t dim, int type) {
    if (type == INT8) { /* exact: at most 2^18 channels */
        const int8_t *codes = (const int8_t *)values + at;
        uint32_t sum = 0;
        for (int64_t d = 0; d < dim; d++) sum += (uint16_t)(codes[d] * codes[d]); /* half as wide, as it fits */
        return (float)sum;
    }
    float sum = 0;
    for (int64_t d = 0; d < dim; d++) {
        float value = element(values, at + d, type);
        sum += value * value;
    }
    return sum;
}

INLINE void lengths(const Norms *task, int64_t layer, int64_t head, int type) {
    float *output = task->output + (layer * task->heads + head) * task->entries;
    int64_t at = layer * task->layer + head * task->head, dim = task->dim;
    for (int64_t j = 0; j < task->entries; j++) output[j] = squares(task->values, at + j * dim, dim, type);
    for (int64_t j = 0; j < task->entries; j++) output[j] = sqrtf(output[j]);
    if (type != INT8) return;
    const float *scales = task->scales + layer * task->scale_layer + head * task->scale_head;
    for (int64_t j = 0; j < task->entries; j++) output[j] *= scales[j];
}

FOR_EACH_PROCESSOR static void norms(const Norms *task, int64_t layer, int64_t head) {
    switch (task->type) {
    case INT8: lengths(task, layer, head, INT8); break;
    case BFLOAT16: lengths(task, layer, head, BFLOAT16); break;
    default: lengths(task, layer, head, FLOAT32);
    }
}

int apiary_norms(const Norms *task) {
#pragma omp for collapse(2) nowait
    for (int64_t layer = 0; layer < task->rows; layer++)
        for (int64_t head = 0; head < task->heads; head++) norms(task, layer, head);
    return 0;
}

/* Whole numbers in the order of floats. Both zeros are one, and NaN is infinite. */
INLINE uint32_t rank_of(float score) {
    const uint32_t sign = 1u << 31, infinite = 0x7f800000;
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    uint32_t size = bits & ~sign;
    if (size > infinite) return infinite | sign;
    return bits & sign ? sign - size : sign + size;
}

FOR_EACH_PROCESSOR static void honeycomb(const Honeycomb *task, int64_t row) {
    int64_t entries = task->entries, others = entries - task->hot, cells = task->cells;
    const float *score = task->score + row * entries;
    uint32_t *ranks = task->ranks + row * entries, least = 0;
    int64_t *kept = task->kept + row * (task->hot + cells);
    for (int64_t j = 0; j < entries; j++) ranks[j] = rank_of(score[j]);
    /* The rank of the last that is hot, bit by bit: as many as there shall be, or more, have it at least. */
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        uint32_t count = 0;
        for (int64_t j = 0; j < entries; j++) count += ranks[j] >= (least | bit);
        if (count >= task->hot) least |= bit;
    }
    int64_t above = 0;
    for (int64_t j = 0; j < entries; j++) above += ranks[j] > least;
    int64_t room = task->hot - above, place = 0, number = 0, cell = 0, end = 0, best = -1;
    for (int64_t j = 0; j < entries; j++) {
        if (ranks[j] > least || (ranks[j] == least && room-- > 0)) {
            kept[place++] = j;
            continue;
        }
        if (!cells) continue;
        if (number++ == end) end = ++cell * others / cells, best = place++;
        else if (ranks[j] <= ranks[kept[best]]) continue;
        /* those that came between are hot, and stay in order behind the best before this one */
        for (; best + 1 < place; best++) kept[best] = kept[best + 1];
        kept[best] = j;
    }
}

int apiary_honeycomb(const Honeycomb *task) {
#pragma omp for nowait
    for (int64_t row = 0; row < task->rows; row++) honeycomb(task, row);
    return 0;
}

int apiary_keep(const Keep *task) {
#pragma omp for collapse(2) nowait
    for (int64_t layer = 0; layer < task->rows; layer++)
        for (int64_t head = 0; head < task->heads; head++) {
            const char *source = task->source + layer * task->source_layer + head * task->source_head;
            char *target = task->target + layer * task->target_layer + head * task->target_head;
            const int64_t *index = task->index + (layer * task->heads + head) * task->kept;
            for (int64_t first = 0, end; first < task->kept; first = end) {
                for (end = first + 1; end < task->kept && index[end] == index[end - 1] + 1; end++) {}
                const char *from = source + index[first] * task->bytes;
                char *to = target + first * task->bytes;
                if (to != from) memmove(to, from, (end - first) * task->bytes);
            }
        }
    return 0;
}
