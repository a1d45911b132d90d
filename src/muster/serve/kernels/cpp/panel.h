// A panel of weights times all rows, as `blocks.h` places them.
#pragma once
#include "product.h"

// Weights that memory is told of ahead of their time, an equal part in each of so many steps: the next panel's while
// rows are multiplied with this one several times, or else what is so much further on, which goes into cache `ONCE`.
template <_mm_hint ONCE>
class Ahead {
 public:
  static constexpr int64_t BYTES = 8192;
  Ahead(const void* weights, int64_t bytes, int64_t times, int64_t steps)
      : from_(static_cast<const char*>(weights) + (times > 1 ? bytes : BYTES)),
        part_(bytes / (times * steps)),
        again_(times > 1) {}
  void operator()(int64_t step) const {
    const char* at = from_ + step * part_;
    for (int64_t byte = 0; byte < part_; byte += 64)
      again_ ? _mm_prefetch(at + byte, _MM_HINT_T1) : _mm_prefetch(at + byte, ONCE);
  }

 private:
  const char* from_;
  int64_t part_;
  bool again_;
};

// A panel's columns for a block of rows that begins in this step.
template <class T>
struct Told : Stored<T> {
  const Ahead<_MM_HINT_T1>& ahead;
  int64_t step;

  auto at(int64_t u) const {
    ahead(step + u);
    return Stored<T>::at(u);
  }
};
// With so few rows memory is busy all the time, and does best when left alone.
constexpr int FEW_ROWS = 5;

// finish(row, column, its 16 sums) for each row of `placed` times a panel, which `bytes` of `weights` were made into.
template <class T, class Finish>
inline void multiply_panel(const RowBlocks& blocks, const uint32_t* placed, const void* panel, int64_t units,
                           const void* weights, int64_t bytes, const Finish& finish) {
  const Ahead<_MM_HINT_T1> ahead(weights, bytes, blocks.count(), units);
  for (int64_t row = 0; row < blocks.rows; row += blocks.height)
    with_count<MOST_ROWS>(blocks.rows_in(row), [&]<int ROWS>() {
      constexpr int WIDE = width(ROWS);
      const Finish own = finish;  // what it refers to would be looked up for each sum
      const Placed<T, ROWS> x(placed + row * units * PARTS<T>, units);
      for (int c = 0; c < PANEL; c += 16 * WIDE) {
        const Stored<T> columns{static_cast<const uint32_t*>(panel) + c, PANEL};
        Sum<T> sums[ROWS][WIDE] = {};
        if constexpr (ROWS > FEW_ROWS)
          product<T, ROWS, WIDE>(x.from, x.row_step, x.unit_step, Told<T>{columns, ahead, row / blocks.height * units},
                                 units, sums);
        else
          product<T, ROWS, WIDE>(x.from, x.row_step, x.unit_step, columns, units, sums);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
          for (int v = 0; v < WIDE; v++) own(row + r, c + 16 * v, sums[r][v]);
      }
    });
}
