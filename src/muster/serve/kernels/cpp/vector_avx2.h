// `vector.h` for processors with AVX2, FMA and F16C (x86-64-v3), and for AVX-VNNI where there is that: a vector is two
// registers of 16.
//
// Every operation gives the bits that AVX-512 gives, sums over lanes in the same order, so that only bf16 products
// differ, which AVX512-BF16 rounds in its own way.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "lanes.h"

struct Floats {
  __m256 low, high;
};
struct Ints {  // 32 bits in a lane, unless a name says otherwise
  __m256i low, high;
};

// Rows that the kernels compute at a time at most, and vectors of columns of so many rows: up to 12 sums of 8 lanes, two
// columns and a broadcast. Few rows take both vectors of a panel, so that sums do not wait for each other.
constexpr int MOST_ROWS = 6, MOST_ROWS_INT4 = 4;
constexpr int width(int rows) { return rows <= 3 ? 2 : 1; }
constexpr int ATTENTION_ROWS = 6;
constexpr int attention_width(int rows) { return rows <= 3 ? 2 : 1; }

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats as_floats(Ints bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }  // as AVX-512's

inline Ints bit_and(Ints a, __m256i b) { return {_mm256_and_si256(a.low, b), _mm256_and_si256(a.high, b)}; }

// All bits of the lanes that are meant.
inline Ints mask_of(Lanes lanes) {
  const __m256i all = _mm256_set1_epi32(lanes), low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}

// Loads and stores take the first so many lanes. There are no masks for less than 32 bits, so rows' ends go through
// memory of their own.
template <class T>
inline int64_t bytes_of(Lanes lanes) {
  return __builtin_popcount(lanes) * sizeof(T);
}

inline Ints load_ints(const void* from) {
  const auto at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Ints load_ints(const void* from, Lanes lanes) {
  if (lanes == 0xffff) return load_ints(from);
  const auto at = static_cast<const int*>(from);
  const Ints mask = mask_of(lanes);
  return {_mm256_maskload_epi32(at, mask.low), _mm256_maskload_epi32(at + 8, mask.high)};
}
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Lanes lanes) { return as_floats(load_ints(from, lanes)); }
inline Ints load_uint16(const void* from, Lanes lanes) {
  __m128i end[2] = {};
  auto at = static_cast<const __m128i*>(from);
  if (lanes != 0xffff) at = static_cast<const __m128i*>(std::memcpy(end, from, bytes_of<uint16_t>(lanes)));
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), _mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1))};
}
inline Ints load_int8(const void* from, Lanes lanes) {
  __m128i end = {};
  if (lanes != 0xffff) from = std::memcpy(&end, from, bytes_of<int8_t>(lanes));
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
}
inline void store_ints(void* to, Ints x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), x.low);
  _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, x.high);
}
inline void store(float* to, Floats x) { store_ints(to, as_ints(x)); }
inline void store(float* to, Floats x, Lanes lanes) {
  if (lanes == 0xffff) return store(to, x);
  const Ints mask = mask_of(lanes);
  _mm256_maskstore_ps(to, mask.low, x.low);
  _mm256_maskstore_ps(to + 8, mask.high, x.high);
}
inline void store_ints(void* to, Ints x, Lanes lanes) { store(static_cast<float*>(to), as_floats(x), lanes); }
inline __m128i low_bytes(Ints x) {
  const __m256i low = bit_and(x, _mm256_set1_epi32(255)).low, high = bit_and(x, _mm256_set1_epi32(255)).high;
  const __m256i words = _mm256_packus_epi32(low, high);  // by halves of registers: 0-3 8-11, 4-7 12-15
  const __m256i bytes = _mm256_packus_epi16(words, words);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}
inline void store_int8(int8_t* to, Ints x, Lanes lanes) {
  const __m128i bytes = low_bytes(x);
  if (lanes == 0xffff)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else
    std::memcpy(to, &bytes, bytes_of<int8_t>(lanes));
}

inline Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fmsub(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) {  // b where one is no number
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats keep(Lanes lanes, Floats x) {  // else 0
  const Floats mask = as_floats(mask_of(lanes));
  return {_mm256_and_ps(mask.low, x.low), _mm256_and_ps(mask.high, x.high)};
}
inline Floats max(Lanes lanes, Floats a, Floats b) {  // else a
  const Floats mask = as_floats(mask_of(lanes)), most = max(a, b);
  return {_mm256_blendv_ps(a.low, most.low, mask.low), _mm256_blendv_ps(a.high, most.high, mask.high)};
}
inline Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats rounded(Floats x) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, HOW), _mm256_round_ps(x.high, HOW)};
}
inline float first_of(Floats x) { return _mm256_cvtss_f32(x.low); }

inline float sum_of(Floats x) {
  const __m256 eight = _mm256_add_ps(x.high, x.low);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.high, x.low);
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints bit_or(Ints a, Ints b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
inline int32_t sum_of(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
template <int BITS>
inline Ints shift_left(Ints x) {
  return {_mm256_slli_epi32(x.low, BITS), _mm256_slli_epi32(x.high, BITS)};
}
template <int BITS>
inline Ints shift_right(Ints x) {
  return {_mm256_srli_epi32(x.low, BITS), _mm256_srli_epi32(x.high, BITS)};
}
template <int BITS>
inline Ints shift_right_signed(Ints x) {
  return {_mm256_srai_epi32(x.low, BITS), _mm256_srai_epi32(x.high, BITS)};
}

// x * 2^power, for whole powers from -126 on; from 128 on it is infinite.
inline Floats times_power_of_2(Floats x, Floats power) {
  const __m256 most = _mm256_set1_ps(128.f);
  const Ints exponent = to_ints({_mm256_min_ps(power.low, most), _mm256_min_ps(power.high, most)});
  return x * as_floats(shift_left<23>(add(exponent, broadcast(127))));
}

inline __m256i round_to_bf16(__m256 x) {  // to the nearest, ties to even, in the low bits
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);  // the sum would carry into the exponent
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan)), 16);
}
inline void store(bfloat16* to, Floats x, Lanes lanes = 0xffff) {
  const __m256i mixed = _mm256_packus_epi32(round_to_bf16(x.low), round_to_bf16(x.high));
  const __m256i bits = _mm256_permute4x64_epi64(mixed, 0b11'01'10'00);  // it packs halves of registers
  if (lanes == 0xffff)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  else
    std::memcpy(to, &bits, bytes_of<bfloat16>(lanes));
}

// bf16 are multiplied as floats, and bytes as 16-bit numbers where there is no instruction for bytes.
template <class T>
constexpr int PARTS = 1;
template <>
constexpr int PARTS<bfloat16> = 2;
#ifndef __AVXVNNI__
template <>
constexpr int PARTS<int8_t> = 2;
#endif

// sum + a * b, over the number of each lane's unit or of a part of it.
template <class T>
inline __attribute__((always_inline)) Floats multiply_add(Floats sum, Ints a, Ints b) {
  return fmadd(as_floats(a), as_floats(b), sum);
}

inline Ints low_nibbles(Ints bytes) { return bit_and(bytes, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints bytes) {
  return low_nibbles({_mm256_srli_epi16(bytes.low, 4), _mm256_srli_epi16(bytes.high, 4)});
}
inline Ints even_bytes(Ints x) { return bit_and(x, _mm256_set1_epi16(0xff)); }
inline Ints odd_bytes(Ints x) { return {_mm256_srli_epi16(x.low, 8), _mm256_srli_epi16(x.high, 8)}; }
inline Ints odd_signed(Ints x) { return {_mm256_srai_epi16(x.low, 8), _mm256_srai_epi16(x.high, 8)}; }
inline Ints even_signed(Ints x) { return odd_signed({_mm256_slli_epi16(x.low, 8), _mm256_slli_epi16(x.high, 8)}); }
inline Ints high_half(Ints x) { return bit_and(x, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))); }

#ifdef __AVXVNNI__
// sum + the four products of unsigned a and signed b, in each lane. Written out because GCC copies and spills around its
// builtin; vex because assemblers would take AVX-512's instruction of that name.
inline __attribute__((always_inline)) Ints multiply_add(Ints sum, Ints a, Ints b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.low) : "x"(a.low), "x"(b.low));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.high) : "x"(a.high), "x"(b.high));
  return sum;
}
// The same where a is at most 15, for sums of 32 products that begin with `nibble_begin` and end with `full_sum`.
inline int32_t nibble_begin(int32_t begin) { return begin; }
inline __attribute__((always_inline)) Ints multiply_add_nibbles(Ints sum, Ints a, Ints b) {
  return multiply_add(sum, a, b);
}
inline Ints full_sum(Ints nibble_sum) { return nibble_sum; }
#else
// sum + the two products of 16-bit numbers, in each lane. The instruction for pairs of bytes would not do: it cuts off
// 255 * 127 * 2 at 32767. Sums are written out because GCC would first add up the products of both parts of a unit, for
// which there are no registers: slower loops by a fifth.
inline __attribute__((always_inline)) Ints multiply_add(Ints sum, Ints a, Ints b) {
  asm("vpaddd %1, %0, %0" : "+x"(sum.low) : "x"(_mm256_madd_epi16(a.low, b.low)));
  asm("vpaddd %1, %0, %0" : "+x"(sum.high) : "x"(_mm256_madd_epi16(a.high, b.high)));
  return sum;
}
// For unsigned a up to 15 it does. Sums of 32 products a * b that begin with -8 times the sum of b stay within 16 bits
// also where all of the beginning is in one of a lane's two: 16 times 7 * 127 and 16 times 8 * 127 are 30480, and
// 32 times -8 * 127 is -32512. What is between may wrap around.
inline int32_t nibble_begin(int32_t begin) { return begin & 0xffff; }
inline __attribute__((always_inline)) Ints multiply_add_nibbles(Ints sum, Ints a, Ints b) {
  return {_mm256_add_epi16(sum.low, _mm256_maddubs_epi16(a.low, b.low)),
          _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(a.high, b.high))};
}
inline Ints full_sum(Ints nibble_sum) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(nibble_sum.low, one), _mm256_madd_epi16(nibble_sum.high, one)};
}
#endif

inline Ints multiply_16(Ints a, Ints b) {
  return {_mm256_mullo_epi16(a.low, b.low), _mm256_mullo_epi16(a.high, b.high)};
}
inline Ints subtract_8(Ints a, Ints b) { return {_mm256_sub_epi8(a.low, b.low), _mm256_sub_epi8(a.high, b.high)}; }

// 16-bit numbers: 32 int8 made wider, a lane's halves from two vectors, and sum + the two products of each lane.
inline Ints load_pairs(const int8_t* from) {
  const auto at = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
}
inline Ints halves(Ints low, Ints high) {
  return {_mm256_blend_epi16(low.low, high.low, 0xaa), _mm256_blend_epi16(low.high, high.high, 0xaa)};
}
inline Ints multiply_add_pairs(Ints sum, Ints a, Ints b) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
}

// Of lanes that lie APART lanes from each other, the sum in the first and the difference in the second.
template <int APART>
inline Floats sum_and_difference(Floats x) {
  if constexpr (APART == 8) {
    return {_mm256_add_ps(x.high, x.low), _mm256_sub_ps(x.low, x.high)};
  } else {
    const auto half = [](__m256 x) {
      __m256 other;
      if constexpr (APART == 1) other = _mm256_permute_ps(x, 0b10'11'00'01);
      if constexpr (APART == 2) other = _mm256_permute_ps(x, 0b01'00'11'10);
      if constexpr (APART == 4) other = _mm256_permute2f128_ps(x, x, 1);
      constexpr int SECOND = APART == 1 ? 0xaa : APART == 2 ? 0xcc : 0xf0;
      return _mm256_fmadd_ps(x, _mm256_blend_ps(_mm256_set1_ps(1.f), _mm256_set1_ps(-1.f), SECOND), other);
    };
    return {half(x.low), half(x.high)};
  }
}

// An 8 x 8 matrix of units, by halves of ever larger size.
inline void transpose(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
// A 16 x 16 matrix, by its quarters.
inline void transpose(Ints (&r)[16]) {
  __m256i quarter[4][8];
  for (int i = 0; i < 8; i++) {
    quarter[0][i] = r[i].low, quarter[1][i] = r[i].high;
    quarter[2][i] = r[i + 8].low, quarter[3][i] = r[i + 8].high;
  }
  for (auto& one : quarter) transpose(one);
  for (int i = 0; i < 8; i++) {
    r[i] = {quarter[0][i], quarter[2][i]};
    r[i + 8] = {quarter[1][i], quarter[3][i]};
  }
}
