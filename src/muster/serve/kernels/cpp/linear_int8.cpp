// W8A8: weights in 8 bits with a scale for each output feature, activations in 8 bits with a scale for each row.
// Panels [panel][4 inputs][32 features][4]: what VNNI's dpbusd multiplies. It takes its first factor unsigned, so 128
// is added to each weight; a row's `correction`, -128 times the sum of its activations, takes that back.
#include "quantize.h"
#include "tiles.h"

#ifdef __AMX_INT8__
// From so many rows on, tiles are faster. The results are the same.
constexpr int64_t FOR_TILES = 8;

static void linear_in_tiles(const void* x, const uint8_t* weight, const float* scale, const float* bias, void* out,
                            int64_t rows, int64_t inputs, int64_t padded, int64_t features, int64_t threads,
                            bool narrow_in, bool narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_corrections;
  const TileRows tiles(rows);
  uint32_t* q = scratch(kept_q, tiles.numbers(padded / 4));
  float* scales = scratch(kept_scales, rows);
  int32_t* corrections = scratch(kept_corrections, rows);
  quantize_rows(x, narrow_in, tiles, q, scales, corrections, -128, inputs, padded, padded, threads);
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    multiply_panel<uint8_t, int32_t>(tiles, q, weight + panel * padded * PANEL, padded / 4,
                                    [&](int64_t row, const int32_t* sums) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const int64_t c = panel * PANEL + 16 * v;
        const __m512 by = _mm512_loadu_ps(scale + c), plus = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
        const __m512i whole = _mm512_add_epi32(_mm512_load_si512(sums + 16 * v), _mm512_set1_epi32(corrections[row]));
        const __m512 both = _mm512_mul_ps(_mm512_set1_ps(scales[row]), by);
        store(out, row * features + c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), both, plus), first(features - c),
              narrow_out);
      }
    });
  });
}
#endif

extern "C" void muster_linear_int8(const void* x, const uint8_t* weight, const float* scale, const float* bias,
                                   void* out, int64_t rows, int64_t inputs, int64_t padded, int64_t features,
                                   int64_t threads, int64_t narrow_in, int64_t narrow_out) {
#ifdef __AMX_INT8__
  if (rows >= FOR_TILES && have_tiles())
    return linear_in_tiles(x, weight, scale, bias, out, rows, inputs, padded, features, threads, narrow_in, narrow_out);
#endif
  constexpr int MOST = 12;  // 24 sums, two columns and a broadcast of the 32 registers
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_corrections;
  const RowBlocks blocks(rows, MOST);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float* scales = scratch(kept_scales, rows);
  int32_t* corrections = scratch(kept_corrections, rows);
  quantize_rows(x, narrow_in, blocks, q, scales, corrections, -128, inputs, padded, padded, threads);
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = weight + panel * padded * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST>(blocks.rows_in(row), [&]<int ROWS>() {
        const uint32_t* tokens = q + row * padded / 4;
        __m512i sums[ROWS][2];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_set1_epi32(corrections[row + r]);
        for (int64_t i = 0; i < padded; i += 4) {
          const uint8_t* at = w + i * PANEL;
          const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++) {
            const __m512i same = _mm512_set1_epi32(unit_at(tokens + i / 4 * ROWS + r));
            sums[r][0] = multiply_add(sums[r][0], w0, same);
            sums[r][1] = multiply_add(sums[r][1], w1, same);
          }
        }
#pragma GCC unroll 16
        for (int v = 0; v < 2; v++) {
          const int64_t c = panel * PANEL + 16 * v;
          const __m512 by = _mm512_loadu_ps(scale + c), plus = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++) {
            const __m512 both = _mm512_mul_ps(_mm512_set1_ps(scales[row + r]), by);
            store(out, (row + r) * features + c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), both, plus),
                  first(features - c), narrow_out);
          }
        }
      });
  });
}
