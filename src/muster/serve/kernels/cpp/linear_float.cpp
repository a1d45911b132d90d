// x (rows, inputs) times weights in fp32 or bf16, laid out in panels [panel][unit of inputs][32 features].
#include "product.h"

template <class T>
static void linear(const T* x, const uint32_t* weight, const float* bias, void* out, int64_t rows, int64_t units,
                   int64_t features, int64_t threads, bool narrow) {
  constexpr int MOST = 12;  // 24 sums, two columns and a broadcast of the 32 registers
  const int64_t panels = (features + PANEL - 1) / PANEL, stride = units * 4;
  const char* bytes = reinterpret_cast<const char*>(x);
#pragma omp parallel for num_threads(threads) schedule(dynamic, run_of(panels, threads))
  for (int64_t panel = 0; panel < panels; panel++) {
    const uint32_t* w = weight + panel * units * PANEL;
    const int64_t left = features - panel * PANEL;
    for (int64_t row = 0; row < rows; row += MOST)
      with_count<MOST>(rows - row, [&]<int ROWS>() {
        __m512 sums[ROWS][2];
        for (int v = 0; v < 2; v++)
          for (int r = 0; r < ROWS; r++)
            sums[r][v] = bias ? _mm512_loadu_ps(bias + panel * PANEL + 16 * v) : _mm512_setzero_ps();
        if constexpr (ROWS <= 2) {
          // Memory is what such products wait for, and the processor looks less far ahead than it could.
          constexpr int64_t AHEAD = 16 * PANEL, STEP = 16;
          for (int64_t u = 0; u < units; u += STEP) {
            const int64_t n = std::min(STEP, units - u);
            for (int64_t p = 0; p < 2 * n; p++)
              _mm_prefetch(reinterpret_cast<const char*>(w + u * PANEL + AHEAD + p * 16), _MM_HINT_T0);
            product<T, ROWS, 2>(bytes + row * stride + u * 4, stride, w + u * PANEL, PANEL, n, sums);
          }
        } else {
          product<T, ROWS, 2>(bytes + row * stride, stride, w, PANEL, units, sums);
        }
        for (int v = 0; v < 2; v++)
          for (int r = 0; r < ROWS; r++)
            store(out, (row + r) * features + panel * PANEL + 16 * v, sums[r][v], first(left - 16 * v), narrow);
      });
  }
}

extern "C" void muster_linear_float(const void* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                                    int64_t units, int64_t features, int64_t threads, int64_t narrow_in,
                                    int64_t narrow_out) {
  if (narrow_in)
    linear(static_cast<const bfloat16*>(x), weight, bias, out, rows, units, features, threads, narrow_out);
  else
    linear(static_cast<const float*>(x), weight, bias, out, rows, units, features, threads, narrow_out);
}
