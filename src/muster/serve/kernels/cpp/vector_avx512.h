// `vector.h` for processors with AVX-512 VNNI: a vector is one register of 32.
#pragma once
#include <immintrin.h>

#include "lanes.h"

using Floats = __m512;  // with + - * / of the compiler
using Ints = __m512i;   // 32 bits in a lane, unless a name says otherwise

// Rows that the kernels compute at a time at most, and vectors of columns of so many rows. In fp32, bf16 and int8 these
// are 24 sums, two columns and a broadcast; in int4 12 sums in integers and 12 in floats.
constexpr int MOST_ROWS = 12, MOST_ROWS_INT4 = 6;
constexpr int width(int /*rows*/) { return 2; }
// The same for attention's two products.
constexpr int ATTENTION_ROWS = 4;
constexpr int attention_width(int /*rows*/) { return 4; }

inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Ints broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats as_floats(Ints bits) { return _mm512_castsi512_ps(bits); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }  // to the nearest, ties to even

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
inline Ints load_ints(const void* from, Lanes lanes) { return _mm512_maskz_loadu_epi32(lanes, from); }
inline Ints load_uint16(const void* from, Lanes lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
}
inline Ints load_int8(const void* from, Lanes lanes) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, from));
}
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Floats x, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes, x); }
inline void store_ints(void* to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store_ints(void* to, Ints x, Lanes lanes) { _mm512_mask_storeu_epi32(to, lanes, x); }
inline __m128i low_bytes(Ints x) { return _mm512_cvtepi32_epi8(x); }
inline void store_int8(int8_t* to, Ints x, Lanes lanes) { _mm_mask_storeu_epi8(to, lanes, low_bytes(x)); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is no number
inline Floats max(Lanes lanes, Floats a, Floats b) { return _mm512_mask_max_ps(a, lanes, a, b); }  // else a
inline Floats abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats keep(Lanes lanes, Floats x) { return _mm512_maskz_mov_ps(lanes, x); }  // else 0
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float max_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float first_of(Floats x) { return _mm512_cvtss_f32(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_2(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int BITS>
inline Ints shift_left(Ints x) {
  return _mm512_slli_epi32(x, BITS);
}
template <int BITS>
inline Ints shift_right(Ints x) {
  return _mm512_srli_epi32(x, BITS);
}
template <int BITS>
inline Ints shift_right_signed(Ints x) {
  return _mm512_srai_epi32(x, BITS);
}

inline void store(bfloat16* to, Floats x, Lanes lanes = 0xffff) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const Ints exact = as_ints(x), odd = _mm512_and_si512(shift_right<16>(exact), broadcast(1));
  const Ints rounded = add(exact, add(odd, broadcast(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // the sum would carry into the exponent
  const __m256i bits = _mm512_cvtepi32_epi16(
      shift_right<16>(_mm512_mask_mov_epi32(rounded, nan, broadcast(0x7fc00000))));
#endif
  _mm256_mask_storeu_epi16(to, lanes, bits);
}

// Instructions that multiply and add up a whole unit at once, or else a unit's parts one after the other.
template <class T>
constexpr int PARTS = 1;
#ifndef __AVX512BF16__
template <>
constexpr int PARTS<bfloat16> = 2;
#endif

// The two instructions that everything rests on are written out, because GCC copies and spills around its builtins
// for them: 1.5 times slower loops.

// sum + the four products of unsigned a and signed b, in each lane.
inline __attribute__((always_inline)) Ints multiply_add(Ints sum, Ints a, Ints b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
// sum + a * b, over the one or two numbers of each lane's unit, or those of a part of it.
template <class T>
inline __attribute__((always_inline)) Floats multiply_add(Floats sum, Ints a, Ints b) {
  if constexpr (std::is_same_v<T, bfloat16> && PARTS<T> == 1)
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  else
    sum = fmadd(as_floats(a), as_floats(b), sum);
  return sum;
}

// The same where a is at most 15, for sums of 32 products that begin with `nibble_begin` and end with `full_sum`.
inline int32_t nibble_begin(int32_t begin) { return begin; }
inline __attribute__((always_inline)) Ints multiply_add_nibbles(Ints sum, Ints a, Ints b) {
  return multiply_add(sum, a, b);
}
inline Ints full_sum(Ints nibble_sum) { return nibble_sum; }

inline Ints low_nibbles(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }
inline Ints even_bytes(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi16(0xff)); }
inline Ints odd_bytes(Ints x) { return _mm512_srli_epi16(x, 8); }
inline Ints odd_signed(Ints x) { return _mm512_srai_epi16(x, 8); }
inline Ints even_signed(Ints x) { return odd_signed(_mm512_slli_epi16(x, 8)); }
inline Ints high_half(Ints x) { return _mm512_and_si512(x, broadcast(static_cast<int32_t>(0xffff0000))); }

inline Ints multiply_16(Ints a, Ints b) { return _mm512_mullo_epi16(a, b); }
inline Ints subtract_8(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }

// 16-bit numbers: 32 int8 made wider, a lane's halves from two vectors, and sum + the two products of each lane.
inline Ints load_pairs(const int8_t* from) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Ints halves(Ints low, Ints high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high); }
inline Ints multiply_add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }

// Of lanes that lie APART lanes from each other, the sum in the first and the difference in the second.
template <int APART>
inline Floats sum_and_difference(Floats x) {
  Floats other;
  if constexpr (APART == 1) other = _mm512_permute_ps(x, 0b10'11'00'01);
  if constexpr (APART == 2) other = _mm512_permute_ps(x, 0b01'00'11'10);
  if constexpr (APART == 4) other = _mm512_shuffle_f32x4(x, x, 0b10'11'00'01);
  if constexpr (APART == 8) other = _mm512_shuffle_f32x4(x, x, 0b01'00'11'10);
  constexpr Lanes second = APART == 1 ? 0xaaaa : APART == 2 ? 0xcccc : APART == 4 ? 0xf0f0 : 0xff00;
  return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(second, broadcast(1.f), broadcast(-1.f)), other);
}

// A 16 x 16 matrix of units, by halves of ever larger size.
inline void transpose(Ints (&r)[16]) {
  Ints t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      t[j + i] = _mm512_shuffle_i32x4(r[j + i], r[j + i + 4], 0x88);
      t[j + i + 4] = _mm512_shuffle_i32x4(r[j + i], r[j + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
