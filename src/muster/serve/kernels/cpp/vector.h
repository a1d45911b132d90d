// Sixteen numbers at a time: how fp32 and bf16 are loaded, stored, multiplied and added, and the exponential.
//
// Everything works on "units" of 32 bits along the dimension that is summed over: one float, or two neighbouring
// bf16, because that is what AVX-512's bf16 instruction takes. So one kernel serves both types.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

struct bfloat16 {
  uint16_t bits;
};

inline __mmask16 first(int64_t count) {  // of sixteen lanes
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pairs), 16));
}

inline __m256i narrow(__m512 x) {  // to the nearest bf16, ties to even
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // the sum would carry into the exponent
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

inline __m512 load(const float* from, __mmask16 lanes = 0xffff) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load(const bfloat16* from, __mmask16 lanes = 0xffff) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from));
}
inline void store(float* to, __m512 x, __mmask16 lanes = 0xffff) { _mm512_mask_storeu_ps(to, lanes, x); }
inline void store(bfloat16* to, __m512 x, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(x));
}

// For results whose type is known at run time only: one branch in place of a second copy of a kernel.
inline void store(void* to, int64_t index, __m512 x, __mmask16 lanes, bool narrow) {
  if (narrow)
    store(static_cast<bfloat16*>(to) + index, x, lanes);
  else
    store(static_cast<float*>(to) + index, x, lanes);
}

template <class T>
constexpr int64_t in_unit = 4 / sizeof(T);

// The two instructions that everything rests on are written out, because GCC copies and spills around its builtins
// for them: 1.5 times slower loops.

// sum + the four products of unsigned a and signed b, in each lane.
inline __attribute__((always_inline)) __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// sum + a * b, over the one or two numbers of each lane's unit.
template <class T>
inline __attribute__((always_inline)) __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  } else {
#ifdef __AVX512BF16__
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
  }
}

// e^x for x <= 88 or so, to 2e-7 of its value; what would be denormal is cut off. 2^f by its Taylor series, |f| <= 1/2.
inline __m512 exponential(__m512 x) {
  const __m512 power = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(power, whole);
  __m512 sum = _mm512_set1_ps(1.54035304e-4f);
  for (const float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
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
