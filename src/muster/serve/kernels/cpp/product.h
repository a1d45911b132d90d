// The one matrix product in floating point: of up to ROWS rows with VECTORS * 16 columns, in registers.
#pragma once
#include "vector.h"

// sums[r][v] += a[r][u] * b[u][16 v ...], over units u in order. The order is the same whatever ROWS is, so a row's
// sum does not depend on the rows beside it. `a` is read a unit at a time, from rows `a_stride` bytes apart.
template <class T, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void product(const char* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                                   int64_t units, __m512 (&sums)[ROWS][VECTORS]) {
  for (int64_t u = 0; u < units; u++) {
    __m512i column[VECTORS];
    for (int v = 0; v < VECTORS; v++) column[v] = _mm512_loadu_si512(b + u * b_stride + 16 * v);
    for (int r = 0; r < ROWS; r++) {
      int32_t unit;
      std::memcpy(&unit, a + r * a_stride + u * 4, 4);
      const __m512i same = _mm512_set1_epi32(unit);
      for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add<T>(sums[r][v], same, column[v]);
    }
  }
}
