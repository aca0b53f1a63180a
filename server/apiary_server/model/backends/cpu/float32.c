/* Linear layers of float32.

   A panel of the weight is read once for up to ROWS rows, from the cache for every ROWS more. It is

   - WHOLE: float [inputs, COLUMNS];
   - HALVES: bfloat16 [inputs / 2, COLUMNS, 2];
   - CODES: for each GROUP of inputs, float scales [COLUMNS] and least [COLUMNS], uint8 codes [GROUP, COLUMNS]; a weight
     is scale * code + least. With many rows, a TILE of inputs after the other is decoded for the first of them, and
     kept so for the others in the nearest cache.

   What is read is float32 in any case. Each sum is taken over the inputs in order, whatever the number of rows, so a
   row's result does not depend on the other rows. */

#include "panels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { WHOLE, HALVES, CODES };
enum { GROUP = 32, ROUNDS = 2 + GROUP / 4 }; /* rounds of a group: its scales, its least, its codes of 4 inputs each */
enum { SHARE = 64, BLOCKS = SHARE / ROWS, TILE = 3 * GROUP };

typedef struct {
    __m512 sums[ROWS][VECTORS];
} Sums;

/* What is left of a piece of work: its sums so far, [SHARE, COLUMNS], and a TILE of weights, [TILE, COLUMNS]. */
typedef struct {
    float sums[SHARE * COLUMNS], weights[TILE * COLUMNS];
} Between;

/* sums += the weights of an input times that input of each row. */
INLINE void add(const int rows, const float *restrict input, int64_t stride, const __m512 some[VECTORS], Sums *to) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        __m512 value = _mm512_set1_ps(input[r * stride]);
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) to->sums[r][v] = _mm512_fmadd_ps(value, some[v], to->sums[r][v]);
    }
}

/* Asks for the first `lines` of a round. */
INLINE void ask(Ahead *next, const int lines) {
#pragma GCC unroll 3
    for (int v = 0; v < lines; v++) _mm_prefetch(next->at + v * LINE, _MM_HINT_T0);
    next->at += next->step;
}

INLINE void add_whole(const int rows, const float *restrict input, int64_t stride, int64_t inputs,
                      const float *restrict weights, Ahead *next, const int lines, Sums *to) {
    for (int64_t k = 0; k < inputs; k++, weights += COLUMNS) {
        __m512 some[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) some[v] = _mm512_loadu_ps(weights + v * LANES);
        ask(next, lines);
        add(rows, input + k, stride, some, to);
    }
}

INLINE void add_halves(const int rows, const float *restrict input, int64_t stride, int64_t inputs,
                       const char *restrict weights, Ahead *next, Sums *to) {
    for (int64_t k = 0; k < inputs; k += 2, weights += ROUND) {
        __m512 even[VECTORS], odd[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            __m512i line = _mm512_loadu_si512(weights + v * LINE);
            even[v] = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
            odd[v] = _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32((int)0xffff0000)));
        }
        ask(next, VECTORS);
        add(rows, input + k, stride, even, to);
        add(rows, input + k + 1, stride, odd, to);
    }
}

/* `decoded`, float [inputs, COLUMNS], takes the weights where there is any. */
INLINE void add_codes(const int rows, const float *restrict input, int64_t stride, int64_t inputs,
                      const char *restrict weights, Ahead *next, float *restrict decoded, Sums *to) {
    for (int64_t first = 0; first < inputs; first += GROUP) {
        const float *scales = (const float *)weights, *least = scales + COLUMNS;
        weights += 2 * ROUND;
        ask(next, VECTORS);
        ask(next, VECTORS);
        for (int64_t k = first; k < first + GROUP; k++, weights += COLUMNS) {
            __m512 some[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) {
                __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(weights + v * LANES)));
                some[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), _mm512_loadu_ps(scales + v * LANES),
                                          _mm512_loadu_ps(least + v * LANES));
                if (decoded) _mm512_storeu_ps(decoded + k * COLUMNS + v * LANES, some[v]);
            }
            if (k % 4 == 0) ask(next, VECTORS);
            add(rows, input + k, stride, some, to);
        }
    }
}

INLINE void begin(const int rows, const Linear *task, int64_t column, Sums *all) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            all->sums[r][v] = task->bias ? _mm512_loadu_ps(task->bias + column + v * LANES) : _mm512_setzero_ps();
}

INLINE void finish(const int rows, const Linear *task, int64_t row, int64_t column, const Sums *all) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = column + v * LANES;
            __mmask16 mask = lanes(task->outputs - at);
            if (mask) _mm512_mask_storeu_ps(task->output + (row + r) * task->outputs + at, mask, all->sums[r][v]);
        }
}

/* COLUMNS outputs of `rows` rows. */
INLINE void block(const int rows, const int kind, const Linear *task, int64_t row, int64_t column, const void *weights,
                  Ahead next) {
    const float *input = task->input + row * task->input_row;
    Sums all;
    begin(rows, task, column, &all);
    if (kind == CODES)
        add_codes(rows, input, task->input_row, task->inputs, weights, &next, NULL, &all);
    else if (kind == HALVES)
        add_halves(rows, input, task->input_row, task->inputs, weights, &next, &all);
    else
        add_whole(rows, input, task->input_row, task->inputs, weights, &next, VECTORS, &all);
    finish(rows, task, row, column, &all);
}

/* The same of CODES, for the inputs from `first` on that one tile has: decoded there for the first block of rows,
   and read from it by the others. `sums`, [rows, COLUMNS], are what the tiles before came to. */
INLINE void tile(const int rows, const Linear *task, int64_t row, int64_t column, int64_t first, int decodes,
                 const char *weights, Ahead *next, float *sums, float *decoded) {
    const float *input = task->input + row * task->input_row + first;
    int64_t left = task->inputs - first, inputs = left < TILE ? left : TILE;
    Sums all;
    if (first == 0) begin(rows, task, column, &all);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            if (first) all.sums[r][v] = _mm512_loadu_ps(sums + r * COLUMNS + v * LANES);
    if (decodes)
        add_codes(rows, input, task->input_row, inputs, weights, next, decoded, &all);
    else
        add_whole(rows, input, task->input_row, inputs, decoded, next, 1, &all);
    if (left == inputs) {
        finish(rows, task, row, column, &all);
        return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(sums + r * COLUMNS + v * LANES, all.sums[r][v]);
}

/* COLUMNS outputs of the rows from `row` to before `end`. */
INLINE void columns(const int kind, const Linear *task, int64_t column, int64_t row, int64_t end) {
    int64_t inputs = task->inputs, rounds = kind == CODES ? inputs / GROUP * ROUNDS : kind == HALVES ? inputs / 2 : inputs;
    int64_t size = rounds * ROUND, blocks = (end - row + ROWS - 1) / ROWS;
    const char *panel = (const char *)task->weights + column / COLUMNS * size;
    if (kind == CODES && blocks > 1) {
        Between between;
        Ahead next[BLOCKS];
        for (int64_t b = 0; b < blocks; b++) next[b] = ahead(panel, size, b ? inputs : rounds, b, blocks);
        for (int64_t first = 0; first < inputs; first += TILE, panel += TILE / GROUP * ROUNDS * ROUND)
            for (int64_t b = 0, at = row; b < blocks; b++, at += ROWS) {
#define ONE(ROWS_)                                                                             \
    tile(ROWS_, task, at, column, first, b == 0, panel, &next[b], between.sums + b * ROWS * COLUMNS, between.weights)
                BY_ROWS(end - at, ONE);
#undef ONE
            }
        return;
    }
    for (int64_t b = 0; b < blocks; b++, row += ROWS) {
        Ahead next = ahead(panel, size, rounds, b, blocks);
#define ONE(ROWS_) block(ROWS_, kind, task, row, column, panel, next)
        BY_ROWS(end - row, ONE);
#undef ONE
    }
}

TARGET static void columns_of(const Linear *task, int64_t column, int64_t row, int64_t end) {
    switch (task->kind) {
    case CODES: columns(CODES, task, column, row, end); break;
    case HALVES: columns(HALVES, task, column, row, end); break;
    default: columns(WHOLE, task, column, row, end);
    }
}

int apiary_float32_supported(void) { return __builtin_cpu_supports("avx512f") != 0; }

/* Returns 0, as it needs no memory. A thread is dealt its share of what is left each time it asks: long streams of
   memory at first, and little at the end, since the threads that deliver tokens take a processor now and then. */
int apiary_float32_linear(const Linear *task) {
#pragma omp for collapse(2) schedule(guided) nowait
    for (int64_t row = 0; row < task->rows; row += SHARE)
        for (int64_t column = 0; column < task->outputs; column += COLUMNS)
            columns_of(task, column, row, row + SHARE < task->rows ? row + SHARE : task->rows);
    return 0;
}
#else
int apiary_float32_supported(void) { return 0; }
int apiary_float32_linear(const Linear *task) { return task != 0; }
#endif
