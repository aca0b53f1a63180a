/* Attention over entries in eight bits, by the instruction that multiplies and adds bytes (AVX-512 VNNI).

   Queries and weights become whole numbers of two digits, far finer than those of the entries. What a weight is rounded
   by is carried to another entry's, so that many small ones are not lost together. Sums of whole numbers are exact. */

#pragma once

#include "stream.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define BYTES static inline __attribute__((always_inline)) TARGET

enum { CHUNK = 64 };           /* channels of an entry that are taken together; what `bytes_fit` asks for */
enum { MOST_CODE = 127 * 128 }; /* of a query: digits from -64 to 63, and above them from -127 to 127 */
enum { MOST_WEIGHT = 65534 };   /* to which half a unit may be carried */
enum { EXACT = 1 << 15 }; /* entries whose sums fit 32 bits */

/* Whether entries of so many channels can be read here; of more, sums could overflow. */
static int bytes_fit(int64_t dim) { return dim % CHUNK == 0 && dim <= 256 && __builtin_cpu_supports("avx512vnni"); }

/* Bytes for the digits of GROUP queries, and then of GROUP heads' weights. */
static int64_t bytes_room(int64_t dim, int64_t entries) { return GROUP * 2 * (dim > entries + LANES ? dim : entries + LANES); }

/* 16 vectors of 16 whole numbers each: rows become columns. */
BYTES void transpose(__m512i *x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

/* A query's digits, the upper ones first; returns what they are to be multiplied with. `sum`: of the codes. */
BYTES float encode(const float *restrict query, int64_t dim, int8_t *restrict digits, int32_t *sum) {
    __m512 most = _mm512_set1_ps(1e-30f), nothing = _mm512_setzero_ps();
    __m512i total = _mm512_setzero_si512();
    for (int64_t d = 0; d < dim; d += LANES) {
        __m512 some = _mm512_loadu_ps(query + d);
        most = _mm512_max_ps(_mm512_abs_ps(some), most);
        nothing = _mm512_fmadd_ps(some, _mm512_setzero_ps(), nothing); /* NaN where one is not finite */
    }
    float largest = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(nothing);
    __m512 inverse = _mm512_set1_ps(MOST_CODE / largest);
    for (int64_t d = 0; d < dim; d += LANES) {
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(query + d), inverse));
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(64)), 7);
        total = _mm512_add_epi32(total, code);
        _mm_storeu_si128((__m128i *)(digits + d), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((__m128i *)(digits + dim + d),
                         _mm512_cvtepi32_epi8(_mm512_sub_epi32(code, _mm512_slli_epi32(upper, 7))));
    }
    *sum = _mm512_reduce_add_epi32(total);
    return largest / MOST_CODE;
}

/* As `dot`, times each key's scale: weights[g, j] = queries[g] . keys[j] * scales[j]. `digits` is room for those of
   queries. */
BYTES void byte_dot(const int group, const int64_t dim, const float *restrict queries, const int8_t *restrict keys,
                    Stream stream, const float *restrict scales, int64_t entries, float *restrict weights, int64_t stride,
                    int8_t *restrict digits) {
    float factors[GROUP];
    int32_t offsets[GROUP];
    for (int g = 0; g < group; g++) factors[g] = encode(queries + g * dim, dim, digits + g * 2 * dim, offsets + g);
    for (int64_t j = 0; j < entries; j += LANES) {
        int64_t left = entries - j;
        __m512i sums[GROUP][2];
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) sums[g][0] = sums[g][1] = _mm512_setzero_si512();
        for (int64_t d = 0; d < dim; d += CHUNK) {
            __m512i key[LANES];
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) {
                const int8_t *at = keys + (j + (k < left ? k : 0)) * dim + d;
                ahead(stream, at, CHUNK);
                key[k] = _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8((char)0x80)); /* 128 more */
            }
            transpose(key);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++)
#pragma GCC unroll 4
                for (int g = 0; g < group; g++)
#pragma GCC unroll 2
                    for (int digit = 0; digit < 2; digit++) {
                        int32_t four;
                        memcpy(&four, digits + (g * 2 + digit) * dim + d + 4 * k, sizeof four);
                        sums[g][digit] = _mm512_dpbusd_epi32(sums[g][digit], key[k], _mm512_set1_epi32(four));
                    }
        }
        __mmask16 mask = lanes(left);
        __m512 scale = _mm512_maskz_loadu_ps(mask, scales + j);
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) {
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums[g][0], 7), sums[g][1]);
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * offsets[g]));
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factors[g]));
            _mm512_mask_storeu_ps(weights + g * stride + j, mask, _mm512_mul_ps(product, scale));
        }
    }
}

/* The digits of weights times scales, zeros behind them; returns what they are to be multiplied with. */
BYTES float encode_weights(const float *restrict weights, const float *restrict scales, int64_t entries, int64_t room,
                           uint8_t *restrict digits) {
    __m512 most = _mm512_set1_ps(1e-30f), nothing = _mm512_setzero_ps();
    for (int64_t j = 0; j < entries; j += LANES) {
        __mmask16 mask = lanes(entries - j);
        __m512 some = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weights + j), _mm512_maskz_loadu_ps(mask, scales + j));
        most = _mm512_max_ps(some, most);
        nothing = _mm512_fmadd_ps(some, _mm512_setzero_ps(), nothing);
    }
    float largest = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(nothing);
    __m512 inverse = _mm512_set1_ps(MOST_WEIGHT / largest), carry = _mm512_setzero_ps();
    for (int64_t j = 0; j < entries; j += LANES) {
        __mmask16 mask = lanes(entries - j);
        __m512 some = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weights + j), _mm512_maskz_loadu_ps(mask, scales + j));
        carry = _mm512_fmadd_ps(some, inverse, carry);
        __m512i code = _mm512_cvtps_epi32(_mm512_maskz_mov_ps(mask, carry));
        carry = _mm512_sub_ps(carry, _mm512_cvtepi32_ps(code));
        _mm_storeu_si128((__m128i *)(digits + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
        _mm_storeu_si128((__m128i *)(digits + room + j), _mm512_cvtepi32_epi8(code));
    }
    return largest / MOST_WEIGHT;
}

/* Of CHUNK channels half: in each run of 16 the first 8, or the last. */
BYTES void byte_sum(const int group, const int upper, const int64_t dim, const uint8_t *restrict digits, int64_t room,
                    const float *restrict factors, const int8_t *restrict values, Stream stream, int64_t first, int64_t end,
                    int64_t last, float *restrict output) {
    __m512i sums[GROUP][2][2];
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[g][i / 2][i % 2] = _mm512_setzero_si512();
    for (int64_t j = first; j < end; j += 4) {
        __m512i value[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const int8_t *at = values + (j + k < last ? j + k : last) * dim;
            if (!upper) ahead(stream, at, CHUNK);
            value[k] = _mm512_loadu_si512(at);
        }
        __m512i left = upper ? _mm512_unpackhi_epi8(value[0], value[1]) : _mm512_unpacklo_epi8(value[0], value[1]);
        __m512i right = upper ? _mm512_unpackhi_epi8(value[2], value[3]) : _mm512_unpacklo_epi8(value[2], value[3]);
        __m512i four[2] = {_mm512_unpacklo_epi16(left, right), _mm512_unpackhi_epi16(left, right)};
#pragma GCC unroll 4
        for (int g = 0; g < group; g++)
#pragma GCC unroll 2
            for (int digit = 0; digit < 2; digit++) {
                int32_t weights;
                memcpy(&weights, digits + (g * 2 + digit) * room + j, sizeof weights);
                __m512i weight = _mm512_set1_epi32(weights);
                sums[g][digit][0] = _mm512_dpbusd_epi32(sums[g][digit][0], weight, four[0]);
                sums[g][digit][1] = _mm512_dpbusd_epi32(sums[g][digit][1], weight, four[1]);
            }
    }
    for (int g = 0; g < group; g++)
        for (int i = 0; i < 2; i++) {
            float channels[LANES]; /* four of each run of 16 */
            __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[g][0][i]), _mm512_set1_ps(256),
                                         _mm512_cvtepi32_ps(sums[g][1][i]));
            _mm512_storeu_ps(channels, _mm512_mul_ps(sum, _mm512_set1_ps(factors[g])));
            for (int c = 0; c < LANES; c++) output[g * dim + c / 4 * 16 + upper * 8 + i * 4 + c % 4] += channels[c];
        }
}

/* As `combine`, of values times their scales. `digits` is room for those of weights. */
BYTES void byte_combine(const int group, const int64_t dim, const float *restrict weights, int64_t stride,
                        const int8_t *restrict values, Stream stream, const float *restrict scales, int64_t entries,
                        float *restrict output, uint8_t *restrict digits) {
    float factors[GROUP];
    int64_t room = entries + LANES;
    for (int g = 0; g < group; g++)
        factors[g] = encode_weights(weights + g * stride, scales, entries, room, digits + g * 2 * room);
    for (int64_t first = 0; first < entries; first += EXACT) {
        int64_t end = first + EXACT < entries ? first + EXACT : entries;
        for (int64_t d = 0; d < dim; d += CHUNK) {
            byte_sum(group, 0, dim, digits, room, factors, values + d, stream, first, end, entries - 1, output + d);
            byte_sum(group, 1, dim, digits, room, factors, values + d, stream, first, end, entries - 1, output + d);
        }
    }
}

#define BY_HEADS(heads, DO)                                        \
    for (int64_t g = 0, count; g < (heads); g += count) {          \
        count = (heads) - g < GROUP ? (heads) - g : together(heads); \
        switch (count) {                                           \
        case 4: DO(4); break;                                      \
        case 3: DO(3); break;                                      \
        case 2: DO(2); break;                                      \
        default: DO(1);                                            \
        }                                                          \
    }

/* `byte_dot` of all heads that share the keys. */
TARGET static void byte_dots(int64_t heads, int64_t dim, const float *queries, const int8_t *keys, Stream stream, const float *scales,
                             int64_t entries, float *weights, int64_t stride, int8_t *digits) {
#define DOT(GROUP_) byte_dot(GROUP_, dim, queries + g * dim, keys, stream, scales, entries, weights + g * stride, stride, digits)
    BY_HEADS(heads, DOT)
#undef DOT
}

/* `byte_combine` of all heads that share the values. */
TARGET static void byte_combines(int64_t heads, int64_t dim, const float *weights, int64_t stride, const int8_t *values,
                                 Stream stream, const float *scales, int64_t entries, float *output, uint8_t *digits) {
#define COMBINE(GROUP_) byte_combine(GROUP_, dim, weights + g * stride, stride, values, stream, scales, entries, output + g * dim, digits)
    BY_HEADS(heads, COMBINE)
#undef COMBINE
}
#else
static int bytes_fit(int64_t dim) { return dim < 0; }
static int64_t bytes_room(int64_t dim, int64_t entries) { return dim + entries; }
static void byte_dots(int64_t heads, int64_t dim, const float *queries, const void *keys, Stream stream, const float *scales,
                      int64_t entries, float *weights, int64_t stride, void *digits) {
    (void)heads, (void)dim, (void)queries, (void)keys, (void)stream, (void)scales, (void)entries, (void)weights, (void)stride, (void)digits;
}
static void byte_combines(int64_t heads, int64_t dim, const float *weights, int64_t stride, const void *values,
                          Stream stream, const float *scales, int64_t entries, float *output, void *digits) {
    (void)heads, (void)dim, (void)weights, (void)stride, (void)values, (void)stream, (void)scales, (void)entries, (void)output, (void)digits;
}
#endif
