// Sixteen numbers at a time: how fp32 and bf16 are loaded, stored, multiplied and added, and the exponential. Which
// instructions that takes, only the two headers know that are included here.
//
// Everything works on "units" of 32 bits along the dimension that is summed over: one float, two neighbouring bf16 or
// four int8, because that is what the instructions for them take. So one kernel serves several types. Where a processor
// has no such instruction, a unit is multiplied in two PARTS, as wider numbers of which a lane holds fewer; the first
// factor, which many columns are multiplied with, is then taken apart beforehand, the second in registers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "vector_avx512.h"
#else
#include "vector_avx2.h"
#endif

inline Floats load(const bfloat16* from, Lanes lanes = 0xffff) {
  return as_floats(shift_left<16>(load_uint16(from, lanes)));
}

// For results whose type is known at run time only: one branch in place of a second copy of a kernel.
inline void store(void* to, int64_t index, Floats x, Lanes lanes, bool narrow) {
  if (narrow)
    store(static_cast<bfloat16*>(to) + index, x, lanes);
  else
    store(static_cast<float*>(to) + index, x, lanes);
}

// Part p of a second factor's units.
template <class T>
inline __attribute__((always_inline)) Ints part(Ints units, int p) {
  if constexpr (PARTS<T> == 2 && std::is_same_v<T, bfloat16>) return p ? high_half(units) : shift_left<16>(units);
  if constexpr (PARTS<T> == 2 && std::is_same_v<T, int8_t>) return p ? odd_bytes(units) : even_bytes(units);
  return units;
}

// The same of a first factor's units, which are signed where they are whole numbers.
template <class T>
inline Ints first_part(Ints units, int p) {
  if constexpr (PARTS<T> == 2 && std::is_same_v<T, int8_t>) return p ? odd_signed(units) : even_signed(units);
  return part<T>(units, p);
}

// `count` units of a first factor in parts, `step` apart.
template <class T>
inline void take_apart(const uint32_t* units, uint32_t* to, int64_t count, int64_t step) {
  for (int64_t u = 0; u < count; u++)
    if constexpr (PARTS<T> == 2) {
      to[2 * u * step] = units[u] << 16;
      to[(2 * u + 1) * step] = units[u] & 0xffff0000;
    } else {
      to[u * step] = units[u];
    }
}

// e^x for x <= 88 or so, to 2e-7 of its value; what would be denormal is cut off. 2^f by its Taylor series, |f| <= 1/2.
inline Floats exponential(Floats x) {
  const Floats power = max(x, broadcast(-87.f)) * broadcast(1.44269504f);
  const Floats n = rounded(power), f = power - n;
  Floats sum = broadcast(1.54035304e-4f);
  for (const float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
    sum = fmadd(sum, f, broadcast(term));
  return times_power_of_2(sum, n);
}

// Calls body<n>() for an n of 1..N that is known at run time only, so that n accumulators stay in registers.
template <int N, class Body>
inline void with_count(int64_t n, Body&& body) {
  if (n >= N)
    body.template operator()<N>();
  else if constexpr (N > 1)
    with_count<N - 1>(n, body);
}

// Memory that a thread keeps between calls: asking the system anew each time costs more than small products do.
template <class T>
inline T* scratch(std::vector<T>& kept, int64_t count) {
  if (static_cast<int64_t>(kept.size()) < count + 64) kept.resize(count + 64);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// Output features in a panel: the weights of a panel lie together, in the order in which a thread reads them.
constexpr int64_t PANEL = 32;

// Threads take panels in runs, as they come free: on a machine with neighbours, equal shares would wait for the
// slower core. Which thread computes a panel changes nothing about its result.
inline int64_t run_of(int64_t panels, int64_t threads) { return std::max<int64_t>(1, panels / (threads * 8)); }
