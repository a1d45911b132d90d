// W4A8: weights in 4 bits that are factors of an int8 layer's (`packing.py`), activations in 8 bits with a scale for
// each row. Panels [panel][8 inputs][32 features][4 bytes]: the low half of byte j is input j, the high half input
// 4 + j. Factors [panel][group of 32 inputs][32 features][2]: a number n stands for (n - 8) * first + second.
#include "quantize.h"
#include "tiles.h"

constexpr int64_t GROUP = 32;

// The whole sums of a row and 16 features, as the layer's results.
static inline void finish(void* out, int64_t index, __m512i whole, float row_scale, const float* scale,
                          const float* bias, int64_t column, int64_t features, bool narrow) {
  const __m512 both = _mm512_mul_ps(_mm512_set1_ps(row_scale), _mm512_loadu_ps(scale + column));
  const __m512 plus = bias ? _mm512_loadu_ps(bias + column) : _mm512_setzero_ps();
  store(out, index, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), both, plus), first(features - column), narrow);
}

#ifdef __AMX_INT8__
// From so many rows on, it pays to make a panel's int8 numbers and to multiply with those. The results are the same.
constexpr int64_t FOR_TILES = 16;

// A panel's numbers as int8, [4 inputs][32 features][4].
static void expand(const uint8_t* panel, const int8_t* factor, int64_t padded, int8_t* to) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < padded; g += GROUP)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      // In each lane of 16 bits, a feature's factor: products of two numbers of 4 bits each, side by side, do not meet.
      const __m512i both = _mm512_cvtepi8_epi16(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(factor + g / GROUP * 2 * PANEL + 32 * v)));
      const __m512i one = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
      const __m512i twice = _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
      const __m512i second = _mm512_or_si512(_mm512_srli_epi32(both, 16),
                                             _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
      const __m512i bytes = _mm512_sub_epi16(_mm512_slli_epi16(twice, 3), second);
      const __m512i zero = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 8));  // what n = 0 stands for, negated
      for (int64_t i = g; i < g + GROUP; i += 8) {
        const __m512i b = _mm512_loadu_si512(panel + i * (PANEL / 2) + 64 * v);
        const __m512i low = _mm512_and_si512(b, low_half);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(b, 4), low_half);
        _mm512_store_si512(to + i * PANEL + 64 * v, _mm512_sub_epi8(_mm512_mullo_epi16(low, twice), zero));
        _mm512_store_si512(to + (i + 4) * PANEL + 64 * v, _mm512_sub_epi8(_mm512_mullo_epi16(high, twice), zero));
      }
    }
}

static void linear_in_tiles(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                            const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                            int64_t features, int64_t threads, bool narrow_in, bool narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_sums;
  const TileRows tiles(rows);
  uint32_t* q = scratch(kept_q, tiles.numbers(padded / 4));
  float* scales = scratch(kept_scales, rows);
  int32_t* sums = scratch(kept_sums, rows);
  quantize_rows(x, narrow_in, tiles, q, scales, sums, 1, inputs, padded, padded, threads);
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    static thread_local std::vector<int8_t> kept_panel;
    int8_t* expanded = scratch(kept_panel, padded * PANEL);
    expand(weight + panel * padded * (PANEL / 2), factor + panel * padded / GROUP * 2 * PANEL, padded, expanded);
    multiply_panel<int8_t, int32_t>(tiles, q, expanded, padded / 4, [&](int64_t row, const int32_t* whole) {
      for (int v = 0; v < 2; v++) {
        const int64_t column = panel * PANEL + 16 * v;
        finish(out, row * features + column, _mm512_load_si512(whole + 16 * v), scales[row], scale, bias, column,
               features, narrow_out);
      }
    });
  });
}
#endif

extern "C" void muster_linear_int4(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                                   const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                                   int64_t features, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
#ifdef __AMX_INT8__
  if (rows >= FOR_TILES && have_tiles())
    return linear_in_tiles(x, weight, factor, scale, bias, out, rows, inputs, padded, features, threads, narrow_in,
                           narrow_out);
#endif
  constexpr int MOST = 6;  // 12 sums of a group, and 12 of all
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales;
  static thread_local std::vector<int32_t> kept_sums;
  const int64_t groups = padded / GROUP, panels = (features + PANEL - 1) / PANEL;
  const RowBlocks blocks(rows, MOST);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float* scales = scratch(kept_scales, rows);
  int32_t* activations = scratch(kept_sums, rows * groups);  // the sums of each group
  quantize_rows(x, narrow_in, blocks, q, scales, activations, 1, inputs, padded, GROUP, threads);
  const __m512i low_half = _mm512_set1_epi8(15);
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = weight + panel * padded * (PANEL / 2);
    const int8_t* f = factor + panel * groups * 2 * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST>(blocks.rows_in(row), [&]<int ROWS>() {
        const uint32_t* tokens = q + row * padded / 4;
        __m512i sums[ROWS][2];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
        for (int64_t g = 0; g < groups; g++) {
          __m512i whole[ROWS][2];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            whole[r][0] = whole[r][1] = _mm512_set1_epi32(-8 * activations[(row + r) * groups + g]);
          for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
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
          // A group's sum fits 16 bits, and so does that of its activations: side by side, they are multiplied with
          // the two factors in one instruction.
#pragma GCC unroll 16
          for (int v = 0; v < 2; v++) {
            const __m512i both = _mm512_cvtepi8_epi16(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(f + g * 2 * PANEL + 32 * v)));
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
              const __m512i sum = _mm512_set1_epi32(activations[(row + r) * groups + g] << 16);
              sums[r][v] = _mm512_dpwssd_epi32(sums[r][v], _mm512_mask_blend_epi16(0xaaaaaaaa, whole[r][v], sum), both);
            }
          }
        }
#pragma GCC unroll 16
        for (int v = 0; v < 2; v++) {
          const int64_t column = panel * PANEL + 16 * v;
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
            finish(out, (row + r) * features + column, sums[r][v], scales[row + r], scale, bias, column, features,
                   narrow_out);
        }
      });
  });
}
