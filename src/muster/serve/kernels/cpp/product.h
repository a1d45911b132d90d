// The one matrix product: of up to ROWS rows with VECTORS * 16 columns, in registers.
#pragma once
#include "blocks.h"

// Products of int8 are summed up as whole numbers, others in floating point.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, int8_t>, Ints, Floats>;

// Whole numbers: signed a, unsigned b.
template <class T>
inline __attribute__((always_inline)) Ints multiply_add(Ints sum, Ints a, Ints b) {
  return multiply_add(sum, b, a);
}

// The second factor's columns, unit by unit as they lie in memory: rows of units `step` apart.
template <class T>
struct Stored {
  static constexpr int STEPS = PARTS<T>;  // of a first factor's units, or their parts, for each `at`
  const uint32_t* from;
  int64_t step;

  auto at(int64_t u) const {
    return [here = from + u * step](int p, int v) {
      return part<T>(load_ints(here + 16 * v), p);
    };
  }
};

// sums[r][v] += a[r][u] * b[u][16 v ...], over units u in order. The order is the same whatever ROWS is, so a row's
// sum does not depend on the rows beside it. Units of `a`, or their parts, are `unit_step` apart, its rows `row_step`.
template <class T, int ROWS, int VECTORS, class Columns>
inline __attribute__((always_inline)) void product(const uint32_t* a, int64_t row_step, int64_t unit_step,
                                                   const Columns& b, int64_t count, Sum<T> (&sums)[ROWS][VECTORS]) {
  Sum<T> own[ROWS][VECTORS];  // what others hold a reference to would be written back in every step
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) own[r][v] = sums[r][v];
  for (int64_t u = 0; u < count; u++) {
    const auto here = b.at(u);
#pragma GCC unroll 8
    for (int p = 0; p < Columns::STEPS; p++) {
      Ints column[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) column[v] = here(p, v);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const Ints same = broadcast(unit_at(a + r * row_step + (u * Columns::STEPS + p) * unit_step));
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) own[r][v] = multiply_add<T>(own[r][v], same, column[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) sums[r][v] = own[r][v];
}
