// How rows of activations are grouped for a matrix product: in blocks of equal height, a block's rows interleaved unit
// by unit. A kernel then reads one stream; rows that lie a power of two apart would compete for the same cache lines.
#pragma once
#include "vector.h"

struct RowBlocks {
  int64_t rows, height;

  // As few blocks of at most `most` rows as possible, and none much smaller than the others.
  RowBlocks(int64_t rows, int64_t most) : rows(rows) {
    const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
    height = (rows + blocks - 1) / blocks;
  }
  int64_t rows_in(int64_t first) const { return std::min(height, rows - first); }
  // Of a row's units: where the first is, where another is from there, and how far apart they are.
  int64_t start(int64_t row, int64_t units) const { return row / height * height * units + row % height; }
  int64_t offset(int64_t row, int64_t unit) const { return unit * step(row); }
  int64_t step(int64_t row) const { return rows_in(row / height * height); }
};

inline int32_t unit_at(const uint32_t* from) {
  int32_t unit;
  std::memcpy(&unit, from, 4);
  return unit;
}
