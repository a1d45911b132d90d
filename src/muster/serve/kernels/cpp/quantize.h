// Activations to 8 bits, a scale for each row (token): symmetric, to the nearest, ties to even. Before that, each block
// of 64 numbers is turned by a Hadamard matrix, as the weights were (`packing.py` says why).
#pragma once
#include "low_rank.h"
#include "parallel.h"
#include "tiles.h"

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

// A row of whole numbers, filled with zeros up to `padded`, and its scale; for each `group` of numbers `per_sum` times
// their sum. Where there is a `right`, its `parts` are kept apart.
template <class T>
inline float quantize_row(const T* x, int8_t* q, int32_t* sums, int per_sum, const float* right, float* parts,
                          int64_t inputs, int64_t padded, int64_t group) {
  static thread_local std::vector<float> kept;
  float* mixed = scratch(kept, padded);
  Floats less[RANK];
  if (right) {
    find_parts(x, right, inputs, parts);
    for (int k = 0; k < RANK; k++) less[k] = broadcast(-parts[k]);
  }
  Floats most = broadcast(0.f);
  for (int64_t i = 0; i < padded; i += 64) {
    Floats block[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      block[v] = load(x + i + 16 * v, first(inputs - i - 16 * v));
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
  const Floats inverse = broadcast(largest > 0.f ? 127.f / largest : 0.f);
  for (int64_t g = 0; g < padded; g += group) {
    Ints sum = broadcast(0);
    for (int64_t i = g; i < g + group; i += 16) {
      const Ints whole = to_ints(load(mixed + i) * inverse);
      sum = add(sum, whole);
      store_int8(q + i, whole, 0xffff);
    }
    sums[g / group] = per_sum * sum_of(sum);
  }
  return largest / 127.f;
}

// All rows, each to its place as `Blocks` (`blocks.h`, `tiles.h`) has it; scale (rows,), sums (rows, padded / group).
template <class T, class Blocks>
inline void quantize_rows(const void* x, bool narrow, const Blocks& blocks, uint32_t* q, float* scale, int32_t* sums,
                          int per_sum, const bfloat16* right, float* parts, int64_t inputs, int64_t padded,
                          int64_t group, int64_t threads) {
  static thread_local std::vector<float> kept_right;
  const float* directions = right ? widened(right, padded * RANK, scratch(kept_right, padded * RANK)) : nullptr;
  parallel_for(blocks.count(), 1, threads, [&](int64_t block) {
    static thread_local std::vector<uint32_t> kept;
    const int64_t row = block * blocks.height, units = padded / 4;
    uint32_t* rows = scratch(kept, blocks.height * units);
    for (int64_t r = 0; r < blocks.rows_in(row); r++) {
      auto run = [&](auto* typed) {
        return quantize_row(typed + (row + r) * inputs, reinterpret_cast<int8_t*>(rows + r * units),
                            sums + (row + r) * (padded / group), per_sum, directions, parts + (row + r) * RANK, inputs,
                            padded, group);
      };
      scale[row + r] = narrow ? run(static_cast<const bfloat16*>(x)) : run(static_cast<const float*>(x));
    }
    blocks.template place<T>(row, rows, units, units, q);
  });
}

// A layer's results from whole sums: multiply(blocks, placed rows, panel, its weights, finish) is to multiply them. 128
// was added to each, since VNNI takes its first factor unsigned; `corrections` take that back.
template <class Multiply>
inline void linear_of_whole(const void* x, const Panels& all, const float* scale, const bfloat16* right,
                            const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                            int64_t features, int64_t threads, bool narrow_in, bool narrow_out, int64_t for_tiles,
                            const Multiply& multiply) {
  with_blocks(rows, for_tiles, [&](const auto& blocks) {
    static thread_local std::vector<uint32_t> kept_q;
    static thread_local std::vector<float> kept_scales, kept_parts;
    static thread_local std::vector<int32_t> kept_corrections;
    uint32_t* q = scratch(kept_q, blocks.template room<int8_t>(padded / 4));
    float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
    int32_t* corrections = scratch(kept_corrections, rows);
    quantize_rows<int8_t>(x, narrow_in, blocks, q, scales, corrections, -128, right, parts, inputs, padded, padded,
                          threads);
    const Results results{out, scale, bias, scales, parts, features, narrow_out};
    const int64_t panels = (features + PANEL - 1) / PANEL;
    parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
      multiply(blocks, q, panel, all.at(panel), [=, left = all.left(panel)](int64_t row, int64_t c, Ints sum) {
        const Ints whole[] = {add(sum, broadcast(corrections[row]))};
        results.finish(row, panel, c, left, whole);
      });
    });
  });
}
