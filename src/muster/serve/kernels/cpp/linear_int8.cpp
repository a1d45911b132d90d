// W8A8: weights in 8 bits with a scale for each output feature, activations in 8 bits with a scale for each row.
// Panels [panel][4 inputs][32 features][4]: what VNNI's dpbusd multiplies. It takes its first factor unsigned, so 128
// is added to each weight; a row's `correction`, -128 times the sum of its activations, takes that back. Where there is
// a `right`, `low_rank.h` says what it is, and what lies behind each panel.
#include "operations.h"
#include "quantize.h"
#include "tiles.h"

#ifdef __AMX_INT8__
// From so many rows on, tiles are faster. The results are the same.
constexpr int64_t FOR_TILES = 8;

static void linear_in_tiles(const void* x, const uint8_t* weight, const float* scale, const bfloat16* right,
                            const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                            int64_t features, int64_t threads, bool narrow_in, bool narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales, kept_parts;
  static thread_local std::vector<int32_t> kept_corrections;
  const TileRows tiles(rows);
  uint32_t* q = scratch(kept_q, tiles.numbers(padded / 4));
  float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
  int32_t* corrections = scratch(kept_corrections, rows);
  quantize_rows<1>(x, narrow_in, tiles, q, scales, corrections, -128, right, parts, inputs, padded, padded,
                   threads);
  const Panels all{weight, padded * PANEL, right != nullptr};
  const Results results{out, scale, bias, scales, parts, features, narrow_out != 0};
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = all.at(panel);
    const bfloat16* left = all.left(panel);
    multiply_panel<uint8_t>(tiles, q, w, padded / 4, [&](int64_t row, const int32_t* sums) {
      for (int v = 0; v < 2; v++) {
        const Ints whole[] = {add(load_ints(sums + 16 * v), broadcast(corrections[row]))};
        results.finish(row, panel, 16 * v, left, whole);
      }
    });
  });
}
#endif

extern "C" void muster_linear_int8(const void* x, const uint8_t* weight, const float* scale, const bfloat16* right,
                                   const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                                   int64_t features, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
#ifdef __AMX_INT8__
  if (rows >= FOR_TILES && have_tiles())
    return linear_in_tiles(x, weight, scale, right, bias, out, rows, inputs, padded, features, threads, narrow_in,
                           narrow_out);
#endif
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales, kept_parts;
  static thread_local std::vector<int32_t> kept_corrections;
  const RowBlocks blocks(rows, MOST_ROWS);
  uint32_t* q = scratch(kept_q, rows * padded / 4 * PARTS<int8_t>);
  float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
  int32_t* corrections = scratch(kept_corrections, rows);
  quantize_rows<PARTS<int8_t>>(x, narrow_in, blocks, q, scales, corrections, -128, right, parts, inputs, padded, padded,
                               threads);
  const Panels all{weight, padded * PANEL, right != nullptr};
  const Results results{out, scale, bias, scales, parts, features, narrow_out != 0};
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = all.at(panel);
    const bfloat16* left = all.left(panel);
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST_ROWS>(blocks.rows_in(row), [&]<int ROWS>() {
        constexpr int WIDE = width(ROWS), P = PARTS<int8_t>;
        const uint32_t* tokens = q + row * padded / 4 * P;
        for (int64_t from = 0; from < PANEL; from += 16 * WIDE) {
          Ints sums[ROWS][WIDE];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++) sums[r][v] = broadcast(corrections[row + r]);
          for (int64_t i = 0; i < padded; i += 4)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
              const uint8_t* at = w + i * PANEL + 4 * from;
              Ints column[WIDE];
#pragma GCC unroll 2
              for (int v = 0; v < WIDE; v++) column[v] = part<int8_t>(load_ints(at + 64 * v), p);
#pragma GCC unroll 16
              for (int r = 0; r < ROWS; r++) {
                const Ints same = broadcast(unit_at(tokens + (i / 4 * P + p) * ROWS + r));
#pragma GCC unroll 2
                for (int v = 0; v < WIDE; v++) sums[r][v] = multiply_add(sums[r][v], column[v], same);
              }
            }
#pragma GCC unroll 2
          for (int v = 0; v < WIDE; v++) {
            Ints column[ROWS];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) column[r] = sums[r][v];
            results.finish(row, panel, from + 16 * v, left, column);
          }
        }
      });
  });
}
