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
  Floats most = broadcast(0.f), zero = broadcast(0.f);
  for (int64_t i = 0; i < dim; i += 16) {
    const Floats x = load(from + i, first(dim - i));
    most = max(most, abs(x));
    zero = fmadd(x, broadcast(0.f), zero);
  }
  const float largest = max_of(most);
  const float scale = largest / 127.f + sum_of(zero);
  const Floats inverse = broadcast(largest > 0.f ? 127.f / largest : 0.f);
  for (int64_t i = 0; i < dim; i += 16) {
    const Ints whole = to_ints(load(from + i, first(dim - i)) * inverse);
    store_int8(to + i, whole, first(dim - i));
  }
  std::memcpy(to + dim, &scale, SCALE_BYTES);
}

// Sixteen numbers of a row as T, each in the low bits of its lane.
template <class T>
inline Ints load_bits(const float* from, Lanes lanes) {
  return load_ints(from, lanes);
}
template <class T>
inline Ints load_bits(const bfloat16* from, Lanes lanes) {
  return load_uint16(from, lanes);
}
template <class T>
inline Ints bits_of(Ints whole) {  // exact up to 255
  const Ints bits = as_ints(to_floats(whole));
  return in_unit<T> == 2 ? shift_right<16>(bits) : bits;
}
template <class T>
inline Ints load_bits(const int8_t* from, Lanes lanes) {
  return bits_of<T>(load_int8(from, lanes));
}

// Units `at` to `at` + 16 of a row, of which `left` are left.
template <class T>
inline Ints load_units(const T* row, int64_t at, int64_t left) {
  return load_ints(reinterpret_cast<const uint32_t*>(row) + at, first(left));
}
template <class T>
inline Ints load_units(const int8_t* row, int64_t at, int64_t left) {
  if constexpr (in_unit<T> == 1) {
    return load_bits<T>(row + at, first(left));
  } else {
    const Ints pairs = load_uint16(row + 2 * at, first(left));
    const Ints even = shift_right_signed<24>(shift_left<24>(pairs));
    const Ints odd = shift_right_signed<24>(shift_left<16>(pairs));
    return bit_or(bits_of<T>(even), shift_left<16>(bits_of<T>(odd)));
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
