// x (rows, units) times weights in fp32 or bf16, laid out in panels [panel][unit, filled up to `padded`][32 features].
#include "blocks.h"
#include "operations.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"

// Rows' units, or their parts, as `blocks.h` has them.
template <class T>
static void interleave(const uint32_t* x, uint32_t* to, const RowBlocks& blocks, int64_t units, int64_t threads) {
  parallel_for(blocks.rows, 8, blocks.rows >= 64 ? threads : 1, [&](int64_t row) {
    take_apart<T>(x + row * units, to + blocks.start(row, units * PARTS<T>), units, blocks.step(row));
  });
}

template <class T>
static void linear(const uint32_t* x, const uint32_t* weight, const float* bias, void* out, int64_t rows, int64_t units,
                   int64_t padded, int64_t features, int64_t threads, bool narrow) {
  static thread_local std::vector<uint32_t> kept;
  const RowBlocks blocks(rows, MOST_ROWS);
  if (rows > 1 || PARTS<T> > 1) {
    uint32_t* interleaved = scratch(kept, rows * units * PARTS<T>);
    interleave<T>(x, interleaved, blocks, units, threads);
    x = interleaved;
  }
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint32_t* w = weight + panel * padded * PANEL;
    const int64_t left = features - panel * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST_ROWS>(blocks.rows_in(row), [&]<int ROWS>() {
        constexpr int WIDE = width(ROWS);
        for (int64_t c = 0; c < PANEL; c += 16 * WIDE) {
          Floats sums[ROWS][WIDE];
#pragma GCC unroll 16
          for (int v = 0; v < WIDE; v++)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
              sums[r][v] = bias ? load(bias + panel * PANEL + c + 16 * v) : broadcast(0.f);
          product<T, ROWS, WIDE>(x + row * units * PARTS<T>, 1, ROWS, w + c, PANEL, units, sums);
#pragma GCC unroll 16
          for (int v = 0; v < WIDE; v++)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
              store(out, (row + r) * features + panel * PANEL + c + 16 * v, sums[r][v], first(left - c - 16 * v),
                    narrow);
        }
      });
  });
}

#ifdef __AMX_BF16__
static void linear_in_tiles(const uint32_t* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                            int64_t units, int64_t padded, int64_t features, int64_t threads, bool narrow) {
  static thread_local std::vector<uint32_t> kept;
  const TileRows tiles(rows);
  uint32_t* placed = scratch(kept, tiles.numbers(padded));
  parallel_for(rows, 8, rows >= 64 ? threads : 1, [&](int64_t row) {
    uint32_t* to = placed + tiles.start(row, padded);
    for (int64_t u = 0; u < padded; u += TILE_UNITS)
      store_ints(to + tiles.offset(row, u), load_ints(x + row * units + u, first(units - u)));
  });
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    multiply_panel<bfloat16>(tiles, placed, weight + panel * padded * PANEL, padded,
                             [&](int64_t row, const float* sums) {
      for (int v = 0; v < 2; v++) {
        const int64_t c = panel * PANEL + 16 * v;
        const Floats sum = load(sums + 16 * v);
        store(out, row * features + c, bias ? sum + load(bias + c) : sum, first(features - c), narrow);
      }
    });
  });
}
#endif

extern "C" void muster_linear_float(const void* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                                    int64_t units, int64_t padded, int64_t features, int64_t threads,
                                    int64_t narrow_in, int64_t narrow_out) {
  auto units_of_x = static_cast<const uint32_t*>(x);
#ifdef __AMX_BF16__
  if (narrow_in && have_tiles())
    return linear_in_tiles(units_of_x, weight, bias, out, rows, units, padded, features, threads, narrow_out);
#endif
  if (narrow_in)
    linear<bfloat16>(units_of_x, weight, bias, out, rows, units, padded, features, threads, narrow_out);
  else
    linear<float>(units_of_x, weight, bias, out, rows, units, padded, features, threads, narrow_out);
}
