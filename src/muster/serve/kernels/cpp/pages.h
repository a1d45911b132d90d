// Rows of keys and values in the cache's pages: D numbers as they are computed with, or D int8 and behind them an fp32
// scale (value = number * scale). How they are written, and how they are read as units of what is computed in.
#pragma once
#include "vector.h"

constexpr int64_t SCALE_BYTES = 4;

template <class S>
constexpr int64_t row_numbers(int64_t dim) {
  return std::is_same_v<S, int8_t> ? dim + SCALE_BYTES : dim;
}

template <class S>
inline float scale_of(const S* row, int64_t dim) {
  float scale = 0.f;
  if constexpr (std::is_same_v<S, int8_t>) std::memcpy(&scale, row + dim, SCALE_BYTES);
  return scale;
}

template <class T>
inline void put_row(const T* from, T* to, int64_t dim) {
  std::memcpy(to, from, dim * sizeof(T));
}

// To the nearest, ties to even, the largest number to 127. What is not finite makes the scale so, too: a maximum alone
// would lose it.
template <class T>
inline void put_row(const T* from, int8_t* to, int64_t dim) {
  __m512 most = _mm512_setzero_ps(), zero = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 x = load(from + i, first(dim - i));
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
    zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), zero);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const float scale = largest / 127.f + _mm512_reduce_add_ps(zero);
  const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, first(dim - i)), inverse));
    _mm_mask_storeu_epi8(to + i, first(dim - i), _mm512_cvtepi32_epi8(whole));
  }
  std::memcpy(to + dim, &scale, SCALE_BYTES);
}

// Sixteen numbers of a row as T, each in the low bits of its lane.
template <class T>
inline __m512i load_bits(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_epi32(lanes, from);
}
template <class T>
inline __m512i load_bits(const bfloat16* from, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
}
template <class T>
inline __m512i bits_of(__m512i whole) {  // exact up to 255
  const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(whole));
  return in_unit<T> == 2 ? _mm512_srli_epi32(bits, 16) : bits;
}
template <class T>
inline __m512i load_bits(const int8_t* from, __mmask16 lanes) {
  return bits_of<T>(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, from)));
}

// Units `at` to `at` + 16 of a row, of which `left` are left.
template <class T>
inline __m512i load_units(const T* row, int64_t at, int64_t left) {
  return _mm512_maskz_loadu_epi32(first(left), reinterpret_cast<const uint32_t*>(row) + at);
}
template <class T>
inline __m512i load_units(const int8_t* row, int64_t at, int64_t left) {
  if constexpr (in_unit<T> == 1) {
    return load_bits<T>(row + at, first(left));
  } else {
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(left), row + 2 * at));
    const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24);
    const __m512i odd = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 24);
    return _mm512_or_si512(bits_of<T>(even), _mm512_slli_epi32(bits_of<T>(odd), 16));
  }
}

// Calls body<T, S>() for what is computed in and what pages hold.
template <class Body>
inline void with_types(bool narrow, bool quantized, Body&& body) {
  if (narrow)
    quantized ? body.template operator()<bfloat16, int8_t>() : body.template operator()<bfloat16, bfloat16>();
  else
    quantized ? body.template operator()<float, int8_t>() : body.template operator()<float, float>();
}
