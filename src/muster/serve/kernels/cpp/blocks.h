// How rows of activations are grouped for a matrix product: in blocks of equal height, a block's rows interleaved unit
// by unit. A kernel then reads one stream; rows that lie a power of two apart would compete for the same cache lines.
#pragma once
#include "vector.h"

// Whether a block has rows enough for that to pay.
template <class T>
constexpr bool interleaved(int64_t rows) {
  return PARTS<T> > 1 || rows > 4;
}

struct RowBlocks {
  int64_t rows, height;

  // As few blocks of at most `most` rows as possible, and none much smaller than the others.
  explicit RowBlocks(int64_t rows, int64_t most = MOST_ROWS) : rows(rows) {
    const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
    height = (rows + blocks - 1) / blocks;
  }
  int64_t count() const { return (rows + height - 1) / height; }
  int64_t rows_in(int64_t first) const { return std::min(height, rows - first); }
  // Numbers of 32 bits that all rows take.
  template <class T>
  int64_t room(int64_t units) const {
    return rows * units * PARTS<T>;
  }

  // The rows of a block, of which `row` is the first, to where they belong in `to`: in parts, and filled up with zeros
  // from `units` to `padded`.
  template <class T>
  void place(int64_t row, const uint32_t* from, int64_t units, int64_t padded, uint32_t* to) const {
    const int64_t count = rows_in(row);
    to += row * padded * PARTS<T>;
    if (!interleaved<T>(count)) {
      for (int64_t r = 0; r < count; r++)
        for (int64_t u = 0; u < padded; u += 16)
          store_ints(to + r * padded + u, load_ints(from + r * units + u, first(units - u)), first(padded - u));
      return;
    }
    for (int64_t u = 0; u < padded; u += 16) {
      Ints square[16];
      for (int64_t r = 0; r < 16; r++)
        square[r] = r < count ? load_ints(from + r * units + u, first(units - u)) : broadcast(0);
      transpose(square);
      // What lies behind a unit's rows is overwritten by the next one's. Behind a block's last unit is another block.
      const Lanes lanes = u + 32 <= padded ? 0xffff : first(count);
      for (int64_t i = 0; i < std::min<int64_t>(16, padded - u); i++)
        for (int p = 0; p < PARTS<T>; p++, to += count) store_ints(to, first_part<T>(square[i], p), lanes);
    }
  }
};

// A block of ROWS rows where it was placed.
template <class T, int ROWS>
struct Placed {
  const uint32_t* from;
  int64_t row_step, unit_step;

  Placed(const uint32_t* from, int64_t padded)
      : from(from), row_step(interleaved<T>(ROWS) ? 1 : padded), unit_step(interleaved<T>(ROWS) ? ROWS : 1) {}
};

inline int32_t unit_at(const uint32_t* from) {
  int32_t unit;
  std::memcpy(&unit, from, 4);
  return unit;
}
