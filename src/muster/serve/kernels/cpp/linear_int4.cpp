// W4A8: weights in 4 bits (-8..7) with a bf16 scale for each group of inputs of an output feature, activations in 8
// bits with a scale for each row. Panels [panel][8 inputs][32 features][4 bytes]: the low half of byte j is input j,
// the high half input 4 + j, each plus 8. Scales [panel][group][32].
#include "quantize.h"

extern "C" void muster_linear_int4(const void* x, const uint8_t* weight, const bfloat16* scale, const float* bias,
                                   void* out, int64_t rows, int64_t inputs, int64_t padded, int64_t features,
                                   int64_t group, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
  constexpr int MOST = 6;  // 12 sums in integers and 12 in floats
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_sums;
  const int64_t groups = padded / group, panels = (features + PANEL - 1) / PANEL;
  const RowBlocks blocks(rows, MOST);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float* scales = scratch(kept_scales, rows);
  int32_t* corrections = scratch(kept_sums, rows * groups);  // what the 8 that is added to each weight contributes
  quantize_rows(x, narrow_in, blocks, q, scales, corrections, -8, inputs, padded, group, threads);
  const __m512i low_half = _mm512_set1_epi8(15);
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = weight + panel * padded * (PANEL / 2);
    const bfloat16* s = scale + panel * groups * PANEL;
    const int64_t column = panel * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST>(blocks.rows_in(row), [&]<int ROWS>() {
        const uint32_t* tokens = q + row * padded / 4;
        __m512 sums[ROWS][2];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
          __m512i whole[ROWS][2];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            whole[r][0] = whole[r][1] = _mm512_set1_epi32(corrections[(row + r) * groups + g]);
          for (int64_t i = g * group; i < (g + 1) * group; i += 8) {
            const uint8_t* at = w + i * (PANEL / 2);
            const __m512i b0 = _mm512_loadu_si512(at), b1 = _mm512_loadu_si512(at + 64);
            // With more to compute than in the other formats, the processor does not look as far ahead as it could.
            _mm_prefetch(reinterpret_cast<const char*>(at + 4096), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(at + 4096 + 64), _MM_HINT_T0);
            const __m512i low0 = _mm512_and_si512(b0, low_half), low1 = _mm512_and_si512(b1, low_half);
            const __m512i high0 = _mm512_and_si512(_mm512_srli_epi16(b0, 4), low_half);
            const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(b1, 4), low_half);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
              const __m512i low = _mm512_set1_epi32(unit_at(tokens + i / 4 * ROWS + r));
              const __m512i high = _mm512_set1_epi32(unit_at(tokens + (i / 4 + 1) * ROWS + r));
              whole[r][0] = multiply_add(whole[r][0], low0, low);
              whole[r][1] = multiply_add(whole[r][1], low1, low);
              whole[r][0] = multiply_add(whole[r][0], high0, high);
              whole[r][1] = multiply_add(whole[r][1], high1, high);
            }
          }
#pragma GCC unroll 16
          for (int v = 0; v < 2; v++) {
            const __m512 by = load(s + g * PANEL + 16 * v);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
              sums[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][v]), by, sums[r][v]);
          }
        }
#pragma GCC unroll 16
        for (int v = 0; v < 2; v++) {
          const int64_t c = column + 16 * v;
          const __m512 plus = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            store(out, (row + r) * features + c, _mm512_fmadd_ps(sums[r][v], _mm512_set1_ps(scales[row + r]), plus),
                  first(features - c), narrow_out);
        }
      });
  });
}
