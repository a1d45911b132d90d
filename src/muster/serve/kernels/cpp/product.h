// The one matrix product in floating point: of up to ROWS rows with VECTORS * 16 columns, in registers.
#pragma once
#include "vector.h"

// sums[r][v] += a[r][u] * b[u][16 v ...], over units u in order. The order is the same whatever ROWS is, so a row's
// sum does not depend on the rows beside it. Units of `a`, or their parts, are `unit_step` apart, its rows `row_step`.
template <class T, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void product(const uint32_t* a, int64_t row_step, int64_t unit_step,
                                                   const uint32_t* b, int64_t b_step, int64_t units,
                                                   Floats (&sums)[ROWS][VECTORS]) {
  Floats own[ROWS][VECTORS];  // what others hold a reference to would be written back in every step
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) own[r][v] = sums[r][v];
  for (int64_t u = 0; u < units; u++)
#pragma GCC unroll 2
    for (int p = 0; p < PARTS<T>; p++) {
      Ints column[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) column[v] = part<T>(load_ints(b + u * b_step + 16 * v), p);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const Ints same = broadcast(static_cast<int32_t>(a[r * row_step + (u * PARTS<T> + p) * unit_step]));
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) own[r][v] = multiply_add<T>(own[r][v], same, column[v]);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) sums[r][v] = own[r][v];
}
