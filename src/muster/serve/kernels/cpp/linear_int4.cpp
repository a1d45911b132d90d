// W4A8: weights in 4 bits (-8..7) with a bf16 scale for each group of inputs of an output feature, activations in 8
// bits with a scale for each row. Panels [panel][8 inputs][32 features][4 bytes]: the low half of byte j is input j,
// the high half input 4 + j, each plus 8. Scales [panel][group][32].
#include "quantize.h"

extern "C" void muster_linear_int4(const void* x, const uint8_t* weight, const bfloat16* scale, const float* bias,
                                   void* out, int64_t rows, int64_t inputs, int64_t padded, int64_t features,
                                   int64_t group, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_sums;
  const int64_t groups = padded / group, panels = (features + PANEL - 1) / PANEL;
  const RowBlocks blocks(rows, MOST_ROWS_INT4);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float* scales = scratch(kept_scales, rows);
  int32_t* corrections = scratch(kept_sums, rows * groups);  // what the 8 that is added to each weight contributes
  quantize_rows<1>(x, narrow_in, blocks, q, scales, corrections, -8, inputs, padded, group, threads);
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = weight + panel * padded * (PANEL / 2);
    const bfloat16* s = scale + panel * groups * PANEL;
    const int64_t column = panel * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST_ROWS_INT4>(blocks.rows_in(row), [&]<int ROWS>() {
        constexpr int WIDE = width(ROWS);
        const uint32_t* tokens = q + row * padded / 4;
        for (int64_t from = 0; from < PANEL; from += 16 * WIDE) {
          Floats sums[ROWS][WIDE];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++) sums[r][v] = broadcast(0.f);
          for (int64_t g = 0; g < groups; g++) {
            Ints whole[ROWS][WIDE];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
              for (int v = 0; v < WIDE; v++) whole[r][v] = nibble_sum(corrections[(row + r) * groups + g]);
            for (int64_t i = g * group; i < (g + 1) * group; i += 8) {
              const uint8_t* at = w + i * (PANEL / 2) + 4 * from;
              Ints low[WIDE], high[WIDE];
#pragma GCC unroll 2
              for (int v = 0; v < WIDE; v++) {
                const Ints bytes = load_ints(at + 64 * v);
                // With more to compute than in the other formats, the processor does not look as far ahead as it could.
                _mm_prefetch(reinterpret_cast<const char*>(at + 4096 + 64 * v), _MM_HINT_T0);
                low[v] = low_nibbles(bytes);
                high[v] = high_nibbles(bytes);
              }
#pragma GCC unroll 16
              for (int r = 0; r < ROWS; r++) {
                const Ints first_four = broadcast(unit_at(tokens + i / 4 * ROWS + r));
                const Ints last_four = broadcast(unit_at(tokens + (i / 4 + 1) * ROWS + r));
#pragma GCC unroll 2
                for (int v = 0; v < WIDE; v++) whole[r][v] = multiply_add_nibbles(whole[r][v], low[v], first_four);
#pragma GCC unroll 2
                for (int v = 0; v < WIDE; v++) whole[r][v] = multiply_add_nibbles(whole[r][v], high[v], last_four);
              }
            }
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++) {
              const Floats by = load(s + g * PANEL + from + 16 * v);
#pragma GCC unroll 16
              for (int r = 0; r < ROWS; r++)
                sums[r][v] = fmadd(to_floats(full_sum(whole[r][v])), by, sums[r][v]);
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < WIDE; v++) {
            const int64_t c = column + from + 16 * v;
            const Floats plus = bias ? load(bias + c) : broadcast(0.f);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
              store(out, (row + r) * features + c, fmadd(sums[r][v], broadcast(scales[row + r]), plus),
                    first(features - c), narrow_out);
          }
        }
      });
  });
}
