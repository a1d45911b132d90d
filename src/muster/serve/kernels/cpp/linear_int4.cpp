// W4A8: weights in 4 bits that are factors of an int8 layer's (`packing.py`), activations in 8 bits with a scale for
// each row. Panels [panel][8 inputs][32 features][4 bytes]: the low half of byte j is input j, the high half input
// 4 + j. Factors [panel][group of 32 inputs][32 features][2]: a number n stands for (n - 8) * first + second.
#include "operations.h"
#include "quantize.h"
#include "tiles.h"

constexpr int64_t GROUP = 32;

#ifdef __AMX_INT8__
// From so many rows on, it pays to make a panel's int8 numbers and to multiply with those. The results are the same.
constexpr int64_t FOR_TILES = 16;

// A panel's numbers as int8, [4 inputs][32 features][4].
static void expand(const uint8_t* panel, const int8_t* factor, int64_t padded, int8_t* to) {
  for (int64_t g = 0; g < padded; g += GROUP)
    for (int v = 0; v < 2; v++) {
      // A feature's factor in each half of its lane: products of numbers of 4 bits, side by side, do not meet.
      const Ints both = load_pairs(factor + g / GROUP * 2 * PANEL + 32 * v);
      const Ints second = bit_or(shift_right<16>(both), high_half(both));
      const Ints twice = halves(both, shift_left<16>(both));
      const Ints least = _mm512_sub_epi16(_mm512_slli_epi16(twice, 3), second);
      const Ints zero = bit_or(least, _mm512_slli_epi16(least, 8));  // what a number of 0 stands for, negated
      for (int64_t i = g; i < g + GROUP; i += 8) {
        const Ints bytes = load_ints(panel + i * (PANEL / 2) + 64 * v);
        int8_t* at = to + i * PANEL + 64 * v;
        store_ints(at, _mm512_sub_epi8(_mm512_mullo_epi16(low_nibbles(bytes), twice), zero));
        store_ints(at + 4 * PANEL, _mm512_sub_epi8(_mm512_mullo_epi16(high_nibbles(bytes), twice), zero));
      }
    }
}

static void linear_in_tiles(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                            const bfloat16* right, const float* bias, void* out, int64_t rows, int64_t inputs,
                            int64_t padded, int64_t features, int64_t threads, bool narrow_in, bool narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales, kept_parts;
  static thread_local std::vector<int32_t> kept_sums;
  const TileRows tiles(rows);
  uint32_t* q = scratch(kept_q, tiles.numbers(padded / 4));
  float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
  int32_t* sums = scratch(kept_sums, rows);
  quantize_rows<1>(x, narrow_in, tiles, q, scales, sums, 1, right, parts, inputs, padded, padded, threads);
  const Panels all{weight, padded * (PANEL / 2), right != nullptr};
  const Results results{out, scale, bias, scales, parts, features, narrow_out};
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = all.at(panel);
    const bfloat16* left = all.left(panel);
    static thread_local std::vector<int8_t> kept_panel;
    int8_t* expanded = scratch(kept_panel, padded * PANEL);
    expand(w, factor + panel * padded / GROUP * 2 * PANEL, padded, expanded);
    multiply_panel<int8_t>(tiles, q, expanded, padded / 4, [&](int64_t row, const int32_t* whole) {
      for (int v = 0; v < 2; v++) {
        const Ints sum[] = {load_ints(whole + 16 * v)};
        results.finish(row, panel, 16 * v, left, sum);
      }
    });
  });
}
#endif

extern "C" void muster_linear_int4(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                                   const bfloat16* right, const float* bias, void* out, int64_t rows, int64_t inputs,
                                   int64_t padded, int64_t features, int64_t threads, int64_t narrow_in,
                                   int64_t narrow_out) {
#ifdef __AMX_INT8__
  if (rows >= FOR_TILES && have_tiles())
    return linear_in_tiles(x, weight, factor, scale, right, bias, out, rows, inputs, padded, features, threads,
                           narrow_in, narrow_out);
#endif
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales, kept_parts;
  static thread_local std::vector<int32_t> kept_sums;
  const int64_t groups = padded / GROUP, panels = (features + PANEL - 1) / PANEL;
  const RowBlocks blocks(rows, MOST_ROWS_INT4);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
  int32_t* activations = scratch(kept_sums, rows * groups);  // the sums of each group
  const Panels all{weight, padded * (PANEL / 2), right != nullptr};
  const Results results{out, scale, bias, scales, parts, features, narrow_out != 0};
  quantize_rows<1>(x, narrow_in, blocks, q, scales, activations, 1, right, parts, inputs, padded, GROUP, threads);
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = all.at(panel);
    const bfloat16* left = all.left(panel);
    const int8_t* f = factor + panel * groups * 2 * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST_ROWS_INT4>(blocks.rows_in(row), [&]<int ROWS>() {
        constexpr int WIDE = width(ROWS);
        const uint32_t* tokens = q + row * padded / 4;
        for (int64_t from = 0; from < PANEL; from += 16 * WIDE) {
          Ints sums[ROWS][WIDE];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++) sums[r][v] = broadcast(0);
          for (int64_t g = 0; g < groups; g++) {
            Ints whole[ROWS][WIDE];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
              for (int v = 0; v < WIDE; v++) whole[r][v] = nibble_sum(-8 * activations[(row + r) * groups + g]);
            for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
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
            // A group's sum fits 16 bits, and so does that of its activations: side by side, they are multiplied with
            // the two factors in one instruction.
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++) {
              const Ints both = load_pairs(f + (g * PANEL + from + 16 * v) * 2);
#pragma GCC unroll 16
              for (int r = 0; r < ROWS; r++) {
                const Ints sum = broadcast(activations[(row + r) * groups + g] << 16);
                sums[r][v] = multiply_add_pairs(sums[r][v], halves(full_sum(whole[r][v]), sum), both);
              }
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
