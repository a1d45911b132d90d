// Activations to 8 bits, a scale for each row (token): symmetric, to the nearest, ties to even.
#pragma once
#include "blocks.h"
#include "parallel.h"

// q: units of four numbers as `blocks.h` has them, zeros behind `inputs` up to `padded`; scale (rows,); and for each
// `group` of numbers `per_sum` times their sum, (rows, padded / group).
template <class T>
inline void quantize_rows(const T* x, const RowBlocks& blocks, uint32_t* q, float* scale, int32_t* sums, int per_sum,
                          int64_t inputs, int64_t padded, int64_t group, int64_t threads) {
  parallel_for(blocks.rows, 4, blocks.rows >= 8 ? threads : 1, [&](int64_t row) {
    const T* from = x + row * inputs;
    uint32_t* to = q + blocks.start(row, padded / 4);
    const int64_t step = blocks.step(row);
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(load(from + i, first(inputs - i))));
    const float largest = _mm512_reduce_max_ps(most);
    scale[row] = largest / 127.f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
    for (int64_t g = 0; g < padded; g += group) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = g; i < g + group; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, first(inputs - i)), inverse));
        sum = _mm512_add_epi32(sum, whole);
        const __m128i units = _mm512_cvtepi32_epi8(whole);
        uint32_t* at = to + i / 4 * step;
        at[0] = _mm_extract_epi32(units, 0);
        at[step] = _mm_extract_epi32(units, 1);
        at[2 * step] = _mm_extract_epi32(units, 2);
        at[3 * step] = _mm_extract_epi32(units, 3);
      }
      sums[row * (padded / group) + g / group] = per_sum * _mm512_reduce_add_epi32(sum);
    }
  });
}

inline void quantize_rows(const void* x, bool narrow, const RowBlocks& blocks, uint32_t* q, float* scale, int32_t* sums,
                          int per_sum, int64_t inputs, int64_t padded, int64_t group, int64_t threads) {
  auto run = [&](auto* typed) {
    quantize_rows(typed, blocks, q, scale, sums, per_sum, inputs, padded, group, threads);
  };
  narrow ? run(static_cast<const bfloat16*>(x)) : run(static_cast<const float*>(x));
}
