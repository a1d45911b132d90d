// Activations to 8 bits, a scale for each row (token): symmetric, to the nearest, ties to even. Before that, each block
// of 64 numbers is turned by a Hadamard matrix, as the weights were (`packing.py` says why).
#pragma once
#include "blocks.h"
#include "parallel.h"

// One of the first four stages: sums and differences of lanes whose numbers differ in one bit.
inline __m512 pair(__m512 x, __m512 partner, __mmask16 second) {
  return _mm512_mask_sub_ps(_mm512_add_ps(partner, x), second, partner, x);
}

// 64 numbers times the orthonormal Hadamard matrix, in the stages' order of `packing.mixed`.
inline void mix(__m512 (&x)[4]) {
#pragma GCC unroll 4
  for (__m512& v : x) {
    v = pair(v, _mm512_permute_ps(v, 0b10'11'00'01), 0xaaaa);
    v = pair(v, _mm512_permute_ps(v, 0b01'00'11'10), 0xcccc);
    v = pair(v, _mm512_shuffle_f32x4(v, v, 0b10'11'00'01), 0xf0f0);
    v = pair(v, _mm512_shuffle_f32x4(v, v, 0b01'00'11'10), 0xff00);
  }
  const __m512 a = _mm512_add_ps(x[0], x[1]), b = _mm512_sub_ps(x[0], x[1]);
  const __m512 c = _mm512_add_ps(x[2], x[3]), d = _mm512_sub_ps(x[2], x[3]);
  const __m512 eighth = _mm512_set1_ps(0.125f);
  x[0] = _mm512_mul_ps(_mm512_add_ps(a, c), eighth);
  x[1] = _mm512_mul_ps(_mm512_add_ps(b, d), eighth);
  x[2] = _mm512_mul_ps(_mm512_sub_ps(a, c), eighth);
  x[3] = _mm512_mul_ps(_mm512_sub_ps(b, d), eighth);
}

// q: units of four numbers where `Blocks` (`blocks.h`, `tiles.h`) has them, of rows filled with zeros up to `padded`;
// scale (rows,); and for each `group` of numbers `per_sum` times their sum, (rows, padded / group).
template <class T, class Blocks>
inline void quantize_rows(const T* x, const Blocks& blocks, uint32_t* q, float* scale, int32_t* sums, int per_sum,
                          int64_t inputs, int64_t padded, int64_t group, int64_t threads) {
  parallel_for(blocks.rows, 4, blocks.rows >= 8 ? threads : 1, [&](int64_t row) {
    static thread_local std::vector<float> kept;
    float* mixed = scratch(kept, padded);
    const T* from = x + row * inputs;
    uint32_t* to = q + blocks.start(row, padded / 4);
    const int64_t step = blocks.step(row);
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded; i += 64) {
      __m512 block[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) block[v] = load(from + i + 16 * v, first(inputs - i - 16 * v));
      mix(block);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        most = _mm512_max_ps(most, _mm512_abs_ps(block[v]));
        _mm512_store_ps(mixed + i + 16 * v, block[v]);
      }
    }
    const float largest = _mm512_reduce_max_ps(most);
    scale[row] = largest / 127.f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
    for (int64_t g = 0; g < padded; g += group) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = g; i < g + group; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(mixed + i), inverse));
        sum = _mm512_add_epi32(sum, whole);
        const __m128i units = _mm512_cvtepi32_epi8(whole);
        uint32_t* at = to + blocks.offset(row, i / 4);
        at[0] = _mm_extract_epi32(units, 0);
        at[step] = _mm_extract_epi32(units, 1);
        at[2 * step] = _mm_extract_epi32(units, 2);
        at[3 * step] = _mm_extract_epi32(units, 3);
      }
      sums[row * (padded / group) + g / group] = per_sum * _mm512_reduce_add_epi32(sum);
    }
  });
}

template <class Blocks>
inline void quantize_rows(const void* x, bool narrow, const Blocks& blocks, uint32_t* q, float* scale, int32_t* sums,
                          int per_sum, int64_t inputs, int64_t padded, int64_t group, int64_t threads) {
  auto run = [&](auto* typed) {
    quantize_rows(typed, blocks, q, scale, sums, per_sum, inputs, padded, group, threads);
  };
  narrow ? run(static_cast<const bfloat16*>(x)) : run(static_cast<const float*>(x));
}
