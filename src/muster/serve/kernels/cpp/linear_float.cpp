// x (rows, inputs) times weights in fp32 or bf16, laid out in panels [panel][unit of inputs][32 features].
#include "blocks.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"

// Rows' units as `blocks.h` has them.
static void interleave(const uint32_t* x, uint32_t* to, const RowBlocks& blocks, int64_t units, int64_t threads) {
  parallel_for(blocks.rows, 8, blocks.rows >= 64 ? threads : 1, [&](int64_t row) {
    uint32_t* at = to + blocks.start(row, units);
    const int64_t step = blocks.step(row);
    for (int64_t u = 0; u < units; u++) at[u * step] = x[row * units + u];
  });
}

template <class T>
static void linear(const uint32_t* x, const uint32_t* weight, const float* bias, void* out, int64_t rows, int64_t units,
                   int64_t features, int64_t threads, bool narrow) {
  constexpr int MOST = 12;  // 24 sums, two columns and a broadcast of the 32 registers
  static thread_local std::vector<uint32_t> kept;
  const RowBlocks blocks(rows, MOST);
  if (rows > 1) {
    uint32_t* interleaved = scratch(kept, rows * units);
    interleave(x, interleaved, blocks, units, threads);
    x = interleaved;
  }
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint32_t* w = weight + panel * units * PANEL;
    const int64_t left = features - panel * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST>(blocks.rows_in(row), [&]<int ROWS>() {
        __m512 sums[ROWS][2];
#pragma GCC unroll 16
        for (int v = 0; v < 2; v++)
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            sums[r][v] = bias ? _mm512_loadu_ps(bias + panel * PANEL + 16 * v) : _mm512_setzero_ps();
        product<T, ROWS, 2>(x + row * units, 1, ROWS, w, PANEL, units, sums);
#pragma GCC unroll 16
        for (int v = 0; v < 2; v++)
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            store(out, (row + r) * features + panel * PANEL + 16 * v, sums[r][v], first(left - 16 * v), narrow);
      });
  });
}

#ifdef __AMX_BF16__
static void linear_in_tiles(const uint32_t* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                            int64_t units, int64_t features, int64_t threads, bool narrow) {
  static thread_local std::vector<uint32_t> kept;
  const TileRows tiles(rows);
  uint32_t* placed = scratch(kept, tiles.numbers(units));
  parallel_for(rows, 8, rows >= 64 ? threads : 1, [&](int64_t row) {
    uint32_t* to = placed + tiles.start(row, units);
    for (int64_t u = 0; u < units; u += TILE_UNITS)
      _mm512_storeu_si512(to + tiles.offset(row, u), _mm512_loadu_si512(x + row * units + u));
  });
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    multiply_panel<bfloat16, float>(tiles, placed, weight + panel * units * PANEL, units,
                                    [&](int64_t row, const float* sums) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const int64_t c = panel * PANEL + 16 * v;
        const __m512 sum = _mm512_load_ps(sums + 16 * v);
        store(out, row * features + c, bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + c)) : sum,
              first(features - c), narrow);
      }
    });
  });
}
#endif

extern "C" void muster_linear_float(const void* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                                    int64_t units, int64_t features, int64_t threads, int64_t narrow_in,
                                    int64_t narrow_out) {
  auto units_of_x = static_cast<const uint32_t*>(x);
#ifdef __AMX_BF16__
  if (narrow_in && have_tiles())
    return linear_in_tiles(units_of_x, weight, bias, out, rows, units, features, threads, narrow_out);
#endif
  if (narrow_in)
    linear<bfloat16>(units_of_x, weight, bias, out, rows, units, features, threads, narrow_out);
  else
    linear<float>(units_of_x, weight, bias, out, rows, units, features, threads, narrow_out);
}
