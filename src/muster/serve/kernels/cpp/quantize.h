// Activations to 8 bits, a scale for each row (token): symmetric, to the nearest, ties to even.
#pragma once
#include "vector.h"

// q (rows, padded) with zeros behind `inputs`, scale (rows,), and sums of each `group` of q: (rows, padded / group).
// `offset` is added to each number: 128 where unsigned ones are wanted.
template <class T>
inline void quantize_rows(const T* x, uint8_t* q, float* scale, int32_t* sums, int64_t rows, int64_t inputs,
                          int64_t padded, int64_t group, int offset, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= 8)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * inputs;
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(load(from + i, first(inputs - i))));
    const float largest = _mm512_reduce_max_ps(most);
    scale[row] = largest / 127.f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
    const __m512i shift = _mm512_set1_epi32(offset);
    for (int64_t g = 0; g < padded; g += group) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = g; i < g + group; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, first(inputs - i)), inverse));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + row * padded + i),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, shift)));
      }
      if (sums) sums[row * (padded / group) + g / group] = _mm512_reduce_add_epi32(sum);
    }
  }
}

inline void quantize_rows(const void* x, bool narrow, uint8_t* q, float* scale, int32_t* sums, int64_t rows,
                          int64_t inputs, int64_t padded, int64_t group, int offset, int64_t threads) {
  if (narrow)
    quantize_rows(static_cast<const bfloat16*>(x), q, scale, sums, rows, inputs, padded, group, offset, threads);
  else
    quantize_rows(static_cast<const float*>(x), q, scale, sums, rows, inputs, padded, group, offset, threads);
}

inline int32_t unit_at(const uint8_t* from) {
  int32_t unit;
  std::memcpy(&unit, from, 4);
  return unit;
}
