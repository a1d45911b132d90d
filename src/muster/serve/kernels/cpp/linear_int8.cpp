// W8A8: weights in 8 bits with a scale for each output feature, activations in 8 bits with a scale for each row.
// Panels [panel][4 inputs][32 features][4]: what VNNI's dpbusd multiplies, unsigned activations by signed weights.
#include "quantize.h"

extern "C" void muster_linear_int8(const void* x, const int8_t* weight, const float* scale, const int32_t* offset,
                                   const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                                   int64_t features, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
  constexpr int MOST = 12;
  static thread_local std::vector<uint8_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  uint8_t* q = scratch(kept_q, rows * padded);
  float* scales = scratch(kept_scales, rows);
  // Activations are made unsigned by adding 128; `offset`, 128 times the sum of a feature's weights, takes it back.
  quantize_rows(x, narrow_in, q, scales, nullptr, rows, inputs, padded, padded, 128, threads);
  const int64_t panels = (features + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, run_of(panels, threads))
  for (int64_t panel = 0; panel < panels; panel++) {
    const int8_t* w = weight + panel * padded * PANEL;
    const int64_t column = panel * PANEL;
    for (int64_t row = 0; row < rows; row += MOST)
      with_count<MOST>(rows - row, [&]<int ROWS>() {
        __m512i sums[ROWS][2];
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
        for (int64_t i = 0; i < padded; i += 4) {
          const __m512i w0 = _mm512_loadu_si512(w + i * PANEL), w1 = _mm512_loadu_si512(w + i * PANEL + 64);
          _mm_prefetch(reinterpret_cast<const char*>(w + i * PANEL + 4096), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(w + i * PANEL + 4096 + 64), _MM_HINT_T0);
          for (int r = 0; r < ROWS; r++) {
            const __m512i same = _mm512_set1_epi32(unit_at(q + (row + r) * padded + i));
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], same, w0);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], same, w1);
          }
        }
        for (int v = 0; v < 2; v++) {
          const int64_t c = column + 16 * v;
          const __m512i back = _mm512_loadu_si512(offset + c);
          const __m512 by = _mm512_loadu_ps(scale + c), plus = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
          for (int r = 0; r < ROWS; r++) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], back));
            const __m512 both = _mm512_mul_ps(_mm512_set1_ps(scales[row + r]), by);
            store(out, (row + r) * features + c, _mm512_fmadd_ps(sum, both, plus), first(features - c), narrow_out);
          }
        }
      });
  }
}
