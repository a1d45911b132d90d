// What an int8 or int4 layer does with its inputs in a few directions is computed in floats (`packing.py` says why):
// parts = right x, results += left parts. What is rounded is x - right^T parts.
#pragma once
#include "vector.h"

constexpr int RANK = 8;

// bf16 as floats: half the memory that a step of one row waits for, and not once more for each row.
inline const float* widened(const bfloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) store(to + i, load(from + i));
  return to;
}

// The parts of a row. `right` is laid out as [16 inputs][RANK][16], and filled up with zeros.
template <class T>
inline void find_parts(const T* x, const float* right, int64_t inputs, float* parts) {
  Floats sums[RANK];
#pragma GCC unroll 8
  for (Floats& sum : sums) sum = broadcast(0.f);
  for (int64_t i = 0; i < inputs; i += 16) {
    const Floats value = load(x + i, first(inputs - i));
#pragma GCC unroll 8
    for (int k = 0; k < RANK; k++) sums[k] = fmadd(load(right + i * RANK + 16 * k), value, sums[k]);
  }
  for (int k = 0; k < RANK; k++) parts[k] = sum_of(sums[k]);
}

// Numbers i to i + 15 of x without its parts, each of which `less` has sixteen times, negated. Two sums, so that they
// wait less for each other.
inline Floats without(Floats x, const Floats (&less)[RANK], const float* right, int64_t i) {
  Floats other = broadcast(0.f);
#pragma GCC unroll 4
  for (int k = 0; k < RANK; k += 2) {
    x = fmadd(less[k], load(right + i * RANK + 16 * k), x);
    other = fmadd(less[k + 1], load(right + i * RANK + 16 * (k + 1)), other);
  }
  return x + other;
}

// A layer's panels, behind each of which lies what becomes of the parts, [RANK][PANEL]: memory is read in one stream.
struct Panels {
  const uint8_t* weight;
  int64_t bytes;  // of the weights of a panel
  bool low_rank;

  const uint8_t* at(int64_t panel) const {
    return weight + panel * (bytes + (low_rank ? RANK * PANEL * sizeof(bfloat16) : 0));
  }
  const bfloat16* left(int64_t panel) const {
    return low_rank ? reinterpret_cast<const bfloat16*>(at(panel) + bytes) : nullptr;
  }
};

// What becomes of whole sums.
struct Results {
  void* out;
  const float *scale, *bias;
  const float *scales, *parts;  // of rows
  int64_t features;
  bool narrow;

  // Of some rows, sixteen columns.
  template <int ROWS>
  inline __attribute__((always_inline)) void finish(int64_t row, int64_t panel, int64_t at, const bfloat16* left,
                                                    const Ints (&whole)[ROWS]) const {
    const int64_t column = panel * PANEL + at;
    const Floats by = load(scale + column), plus = bias ? load(bias + column) : broadcast(0.f);
    Floats sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sums[r] = plus;
    if (left)
      for (int k = 0; k < RANK; k++) {
        const Floats same = load(left + k * PANEL + at);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r] = fmadd(broadcast(parts[(row + r) * RANK + k]), same, sums[r]);
      }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
      store(out, (row + r) * features + column,
            fmadd(to_floats(whole[r]), broadcast(scales[row + r]) * by, sums[r]), first(features - column), narrow);
  }
};
