// Activations to 8 bits, a scale for each row (token): symmetric, to the nearest, ties to even. Before that, each block
// of 64 numbers is turned by a Hadamard matrix, as the weights were (`packing.py` says why).
#pragma once
#include "blocks.h"
#include "low_rank.h"
#include "parallel.h"

// 64 numbers times the orthonormal Hadamard matrix, in the stages' order of `packing.mixed`.
inline void mix(Floats (&x)[4]) {
#pragma GCC unroll 4
  for (Floats& v : x) {
    v = sum_and_difference<1>(v);
    v = sum_and_difference<2>(v);
    v = sum_and_difference<4>(v);
    v = sum_and_difference<8>(v);
  }
  const Floats a = x[0] + x[1], b = x[0] - x[1];
  const Floats c = x[2] + x[3], d = x[2] - x[3];
  const Floats eighth = broadcast(0.125f);
  x[0] = (a + c) * eighth;
  x[1] = (b + d) * eighth;
  x[2] = (a - c) * eighth;
  x[3] = (b - d) * eighth;
}

// q: units of four numbers, or their two parts, where `Blocks` (`blocks.h`, `tiles.h`) has them, of rows filled with
// zeros up to `padded`; scale (rows,); and for each `group` of numbers `per_sum` times their sum, (rows, padded / group).
// Where there is a `right`, `parts` (rows, RANK) are kept apart.
template <int P, class T, class Blocks>
inline void quantize_rows(const T* x, const Blocks& blocks, uint32_t* q, float* scale, int32_t* sums, int per_sum,
                          const float* right, float* parts, int64_t inputs, int64_t padded, int64_t group,
                          int64_t threads) {
  parallel_for(blocks.rows, 4, blocks.rows >= 8 ? threads : 1, [&](int64_t row) {
    static thread_local std::vector<float> kept;
    float* mixed = scratch(kept, padded);
    const T* from = x + row * inputs;
    uint32_t* to = q + blocks.start(row, padded / 4 * P);
    const int64_t step = blocks.step(row);
    float* own = parts + row * RANK;
    Floats less[RANK];
    if (right) {
      find_parts(from, right, inputs, own);
      for (int k = 0; k < RANK; k++) less[k] = broadcast(-own[k]);
    }
    Floats most = broadcast(0.f);
    for (int64_t i = 0; i < padded; i += 64) {
      Floats block[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        block[v] = load(from + i + 16 * v, first(inputs - i - 16 * v));
        if (right) block[v] = without(block[v], less, right, i + 16 * v);
      }
      mix(block);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        most = max(most, abs(block[v]));
        store(mixed + i + 16 * v, block[v]);
      }
    }
    const float largest = max_of(most);
    scale[row] = largest / 127.f;
    const Floats inverse = broadcast(largest > 0.f ? 127.f / largest : 0.f);
    for (int64_t g = 0; g < padded; g += group) {
      Ints sum = broadcast(0);
      for (int64_t i = g; i < g + group; i += 16) {
        const Ints whole = to_ints(load(mixed + i) * inverse);
        sum = add(sum, whole);
        const __m128i units = low_bytes(whole);
        for (int p = 0; p < P; p++) {
          // A part is two 16-bit numbers: the bytes in even places, or those in odd ones.
          const __m128i four = P == 1 ? units : _mm_srai_epi16(p ? units : _mm_slli_epi16(units, 8), 8);
          uint32_t* at = to + blocks.offset(row, i / 4 * P + p);
          at[0] = _mm_extract_epi32(four, 0);
          at[P * step] = _mm_extract_epi32(four, 1);
          at[2 * P * step] = _mm_extract_epi32(four, 2);
          at[3 * P * step] = _mm_extract_epi32(four, 3);
        }
      }
      sums[row * (padded / group) + g / group] = per_sum * sum_of(sum);
    }
  });
}

template <int P, class Blocks>
inline void quantize_rows(const void* x, bool narrow, const Blocks& blocks, uint32_t* q, float* scale, int32_t* sums,
                          int per_sum, const bfloat16* right, float* parts, int64_t inputs, int64_t padded,
                          int64_t group, int64_t threads) {
  static thread_local std::vector<float> kept;
  const float* directions = right ? widened(right, padded * RANK, scratch(kept, padded * RANK)) : nullptr;
  auto run = [&](auto* typed) {
    quantize_rows<P>(typed, blocks, q, scale, sums, per_sum, directions, parts, inputs, padded, group, threads);
  };
  narrow ? run(static_cast<const bfloat16*>(x)) : run(static_cast<const float*>(x));
}
