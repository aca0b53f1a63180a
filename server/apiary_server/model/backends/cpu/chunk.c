/* Attention of a session's new tokens, many at once, to its cache and to each other.

   A piece of work is a tile of neighbouring tokens of one KV head: their logits as products of register
   blocks, softmax, what policies record, and the weighted sums of values, while the tile's weights are in the
   processor's cache. Tiles record apart, and a second pass adds that up in order. */

#include "kernels.h"

#include <stdlib.h>

enum { KEYS = 2 * LANES, DOTS = 8, SUMS = 6, WIDTH = 4 * LANES, VALUES = 128, TILE = 16, FLOATS = 1 << 18 };

/* Strides count elements. The last dimension of all tensors is contiguous. */
typedef struct {
    int64_t tokens, layer, entries, kv_heads, group, dim, type, states; /* entries: the tokens' included */
    const float *queries; /* [tokens, kv_heads * group, dim] */
    int64_t query_row;
    const void *keys, *values; /* [kv_heads, entries, dim] */
    int64_t cache_head;
    const float *key_scales, *value_scales; /* [kv_heads, entries], of entries in eight bits */
    int64_t scale_head;
    float *output; /* [tokens, kv_heads * group, dim], contiguous */
    int64_t seen;
    float scale;
    float log_n; /* 0: none */
    State state[MOST_STATES];
} Chunk;

typedef struct {
    int64_t head, first, tokens, view, lanes, stride, vectors; /* view: entries that the last token sees; lanes: whole LANES of them */
    const float *keys;   /* of the head, in blocks of KEYS, channel by channel */
    const void *values;  /* of the head, [entries, dim], of a type */
    int type;
    float *queries, *output;
    float *weights, *factors; /* what makes a vector's weights sum to 1 */
} Tile;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
INLINE int64_t sees(const Chunk *task, int64_t token) { return task->entries - task->tokens + token + 1; }

/* A head's keys [first, first + KEYS), channel by channel; zeros behind the last. */
FOR_EACH_PROCESSOR static void transpose(const Chunk *task, int64_t head, int64_t first, float *restrict into) {
    int64_t dim = task->dim, from = head * task->cache_head + first * dim;
    int64_t count = smaller(KEYS, task->entries - first);
    const float *scales = task->type == INT8 ? task->key_scales + head * task->scale_head + first : NULL;
    for (int64_t k = 0; k < KEYS; k++) {
        float scale = scales && k < count ? scales[k] : 1;
        for (int64_t d = 0; d < dim; d++)
            into[d * KEYS + k] = k < count ? element(task->keys, from + k * dim + d, task->type) * scale : 0;
    }
}

/* A head's values [first, first + KEYS) in eight bits as floats: so often are they read. */
FOR_EACH_PROCESSOR static void widen(const Chunk *task, int64_t head, int64_t first, float *restrict into) {
    const int8_t *from = (const int8_t *)task->values + head * task->cache_head + first * task->dim;
    const float *scales = task->value_scales + head * task->scale_head + first;
    for (int64_t j = 0; j < smaller(KEYS, task->entries - first); j++)
        for (int64_t d = 0; d < task->dim; d++) into[j * task->dim + d] = from[j * task->dim + d] * scales[j];
}

/* weights[v, :KEYS] = queries[v] . keys, for `count` of at most DOTS vectors. */
INLINE void dots(const int count, int64_t dim, const float *restrict queries, const float *restrict keys,
                 float *restrict weights, int64_t stride) {
    Lanes sums[DOTS][2];
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) sums[v][0] = sums[v][1] = (Lanes){0};
    for (int64_t d = 0; d < dim; d++) {
        Lanes low = *(const Lanes *)(keys + d * KEYS), high = *(const Lanes *)(keys + d * KEYS + LANES);
#pragma GCC unroll 8
        for (int v = 0; v < count; v++) {
            sums[v][0] += queries[v * dim + d] * low;
            sums[v][1] += queries[v * dim + d] * high;
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) {
        *(Lanes *)(weights + v * stride) = sums[v][0];
        *(Lanes *)(weights + v * stride + LANES) = sums[v][1];
    }
}

/* output[v, :WIDTH] += sum of weights[v, j] * values[j, :WIDTH] over j from `first` to before `end`, for `count` of
   at most SUMS vectors. */
INLINE void sums(const int count, const int type, int64_t first, int64_t end, int64_t dim,
                 const float *restrict weights, int64_t stride, const void *restrict values, int64_t channel,
                 float *restrict output) {
    Lanes sums[SUMS][4];
#pragma GCC unroll 6
    for (int v = 0; v < count; v++)
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) sums[v][p] = *(const Lanes *)(output + v * dim + p * LANES);
    for (int64_t j = first; j < end; j++) {
        Lanes part[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) part[p] = elements(values, j * dim + channel + p * LANES, type);
#pragma GCC unroll 6
        for (int v = 0; v < count; v++)
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) sums[v][p] += weights[v * stride + j] * part[p];
    }
#pragma GCC unroll 6
    for (int v = 0; v < count; v++)
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) *(Lanes *)(output + v * dim + p * LANES) = sums[v][p];
}

/* into: of the tile's tokens the last to which an entry mattered, plus one, or the mass of their weights. */
INLINE void record_tile(const Chunk *task, const Tile *tile, const State *state, float *restrict into) {
    int64_t group = task->group, stride = tile->stride;
    memset(into, 0, sizeof(float) * tile->lanes);
    for (int64_t t = 0; t < tile->tokens; t++) {
        const float *restrict weights = tile->weights + t * group * stride, *factors = tile->factors + t * group;
        int64_t view = sees(task, tile->first + t);
        if (state->votes) {
            for (int64_t g = 0; g < group; g++)
                for (int64_t j = 0; j < view; j++)
                    into[j] = weights[g * stride + j] * factors[g] * (float)view >= 1.0f ? (float)(t + 1) : into[j];
        } else
            for (int64_t j = 0; j < tile->lanes; j += LANES) {
                Lanes sum = *(Lanes *)(into + j) * state->decay;
                for (int64_t g = 0; g < group; g++) sum += *(const Lanes *)(weights + g * stride + j) * factors[g];
                *(Lanes *)(into + j) = sum;
            }
    }
}

INLINE void load_queries(const Chunk *task, const Tile *tile) {
    for (int64_t t = 0; t < tile->tokens; t++) {
        int64_t token = tile->first + t;
        float scale = task->scale;
        if (task->log_n) scale *= fmaxf(1.0f, logf((float)sees(task, token)) / logf(task->log_n));
        const float *from = task->queries + token * task->query_row + tile->head * task->group * task->dim;
        for (int64_t i = 0; i < task->group * task->dim; i++)
            tile->queries[t * task->group * task->dim + i] = from[i] * scale;
    }
}

FOR_EACH_PROCESSOR static void work(const Chunk *task, const Tile *tile, float *recorded) {
    float *output = tile->output;
    int64_t dim = task->dim, stride = tile->stride, v;
    const void *values = tile->values;
    load_queries(task, tile);
    for (int64_t first = 0; first < tile->view; first += KEYS) {
        const float *keys = tile->keys + first * dim;
        for (v = 0; v + DOTS <= tile->vectors; v += DOTS)
            dots(DOTS, dim, tile->queries + v * dim, keys, tile->weights + v * stride + first, stride);
        for (; v + 3 <= tile->vectors; v += 3)
            dots(3, dim, tile->queries + v * dim, keys, tile->weights + v * stride + first, stride);
        for (; v < tile->vectors; v++)
            dots(1, dim, tile->queries + v * dim, keys, tile->weights + v * stride + first, stride);
    }
    for (v = 0; v < tile->vectors; v++) {
        int64_t view = sees(task, tile->first + v / task->group);
        tile->factors[v] = exponentials(tile->weights + v * stride, view, 1.0f);
        for (int64_t j = view; j < tile->lanes; j++) tile->weights[v * stride + j] = 0;
    }
    for (int64_t s = 0; s < task->states; s++)
        record_tile(task, tile, &task->state[s], recorded + s * stride);
    int64_t channel = 0;
    memset(output, 0, sizeof(float) * tile->vectors * dim);
#define SUM(COUNT, TYPE)                                                                                     \
    sums(COUNT, TYPE, first, end, dim, tile->weights + v * stride, stride, values, channel, output + v * dim + channel)
#define BY_TYPE(COUNT) tile->type == BFLOAT16 ? SUM(COUNT, BFLOAT16) : SUM(COUNT, FLOAT32)
    for (; channel + WIDTH <= dim; channel += WIDTH)
        for (int64_t first = 0; first < tile->view; first += VALUES) { /* so few stay in the nearest cache */
            int64_t end = smaller(first + VALUES, tile->view);
            for (v = 0; v + SUMS <= tile->vectors; v += SUMS) BY_TYPE(SUMS);
            for (; v + 3 <= tile->vectors; v += 3) BY_TYPE(3);
            for (; v < tile->vectors; v++) BY_TYPE(1);
        }
#undef BY_TYPE
#undef SUM
    if (channel < dim)
        narrow_sums(tile->vectors, tile->type, tile->view, dim, tile->weights, stride, values, channel, output);
    for (v = 0; v < tile->vectors; v++) {
        int64_t token = tile->first + v / task->group, query = tile->head * task->group + v % task->group;
        float *restrict into = task->output + (token * task->kv_heads * task->group + query) * dim;
        for (int64_t d = 0; d < dim; d++) into[d] = output[v * dim + d] * tile->factors[v];
    }
}

/* Adds to a head's state what the tiles recorded, `[tiles, states, stride]`, in their order. */
FOR_EACH_PROCESSOR static void add_up(const Chunk *task, int64_t head, int64_t s, int64_t tile_tokens,
                                      int64_t stride, const float *recorded) {
    const State *state = &task->state[s];
    for (int64_t first = 0; first < task->tokens; first += tile_tokens, recorded += task->states * stride) {
        const float *restrict from = recorded + s * stride;
        int64_t tokens = smaller(tile_tokens, task->tokens - first), view = sees(task, first + tokens - 1);
        if (state->votes) {
            int32_t *restrict last = (int32_t *)state->into + task->layer * state->layer + head * state->head;
            for (int64_t j = 0; j < view; j++)
                last[j] = from[j] > 0 ? (int32_t)(task->seen + first - 1) + (int32_t)from[j] : last[j];
        } else {
            float *restrict mass = (float *)state->into + task->layer * state->layer + head * state->head;
            float decay = powf(state->decay, (float)tokens);
            for (int64_t j = 0; j < view; j++) mass[j] = mass[j] * decay + from[j];
        }
    }
}

/* Returns 0, or 1 where there was no memory. */
int apiary_attend_chunk(const Chunk *task) {
    int64_t most = FLOATS / (task->group * task->entries), dim = task->dim;
    int64_t tokens = most < 1 ? 1 : smaller(most, TILE), tiles = (task->tokens + tokens - 1) / tokens;
    int64_t stride = whole(task->entries, KEYS), vectors = tokens * task->group;
    int64_t kept = task->states * stride;
    int eight = task->type == INT8;
    float *recorded, *keys, *values; /* of all threads */
#pragma omp single copyprivate(recorded, keys, values)
    {
        recorded = malloc(sizeof(float) * (task->kv_heads * tiles * kept + 1));
        keys = malloc(sizeof(float) * task->kv_heads * stride * dim);
        values = eight ? malloc(sizeof(float) * task->kv_heads * stride * dim) : NULL;
    }
    float *memory = malloc(sizeof(float) * vectors * (stride + 2 * dim + 1));
    int failed = memory == NULL || recorded == NULL || keys == NULL || (eight && values == NULL);
#pragma omp for collapse(2)
    for (int64_t head = 0; head < task->kv_heads; head++)
        for (int64_t first = 0; first < stride; first += KEYS) {
            if (!failed) transpose(task, head, first, keys + (head * stride + first) * dim);
            if (!failed && eight) widen(task, head, first, values + (head * stride + first) * dim);
        }
#pragma omp for schedule(dynamic)
    for (int64_t item = task->kv_heads * tiles - 1; item >= 0; item--) { /* those that see most come first */
        if (failed) continue;
        int64_t tile = item / task->kv_heads, head = item % task->kv_heads, first = tile * tokens;
        int64_t here = smaller(tokens, task->tokens - first);
        Tile piece = {
            .head = head,
            .first = first,
            .tokens = here,
            .view = sees(task, first + here - 1),
            .lanes = whole(sees(task, first + here - 1), LANES),
            .stride = stride,
            .vectors = here * task->group,
            .keys = keys + head * stride * dim,
            .values = eight ? (const char *)(values + head * stride * dim)
                            : (const char *)task->values + head * task->cache_head * size_of((int)task->type),
            .type = eight ? FLOAT32 : (int)task->type,
            .queries = memory + vectors * stride,
            .output = memory + vectors * (stride + dim),
            .weights = memory,
            .factors = memory + vectors * (stride + 2 * dim),
        };
        work(task, &piece, recorded + (head * tiles + tile) * kept);
    }
#pragma omp for collapse(2)
    for (int64_t head = 0; head < task->kv_heads; head++)
        for (int64_t s = 0; s < task->states; s++)
            if (!failed) add_up(task, head, s, tokens, stride, recorded + head * tiles * kept);
    free(memory);
#pragma omp single nowait
    {
        free(recorded);
        free(keys);
        free(values);
    }
    return failed;
}
