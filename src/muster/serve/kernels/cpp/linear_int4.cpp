// W4A8: weights in 4 bits that are factors of an int8 layer's (`packing.py`), activations in 8 bits with a scale for
// each row. Panels [panel][8 inputs][32 features][4 bytes]: the low half of byte j is input j, the high half input
// 4 + j. Factors [panel][group of 32 inputs][32 features][2]: a number n stands for (n - 8) * first + second.
#include "operations.h"
#include "quantize.h"

constexpr int64_t GROUP = 32;
// From so many rows on, it pays to make a panel's int8 numbers and to multiply with those. The results are the same.
static int64_t for_whole() { return have_tiles() ? 16 : 24; }

// A panel's numbers as those of an int8 layer, [4 inputs][32 features][4], to each of which 128 is added.
static void expand(const uint8_t* panel, const int8_t* factor, int64_t padded, uint8_t* to) {
  for (int64_t g = 0; g < padded; g += GROUP)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      // A feature's factor in each half of its lane: products of numbers of 4 bits, side by side, do not meet.
      const Ints both = load_pairs(factor + (g / GROUP * PANEL + 16 * v) * 2);
      const Ints twice = halves(both, shift_left<16>(both));
      // In each byte, what a number of 0 stands for, negated, and 128, whose subtraction is its addition.
      Ints zero = multiply_add_pairs(broadcast(128), both, broadcast(8 - (1 << 16)));
      zero = bit_or(zero, shift_left<8>(zero));
      zero = bit_or(zero, shift_left<16>(zero));
#pragma GCC unroll 4
      for (int64_t i = g; i < g + GROUP; i += 8) {
        const Ints bytes = load_ints(panel + i * (PANEL / 2) + 64 * v);
        uint8_t* at = to + i * PANEL + 64 * v;
        store_ints(at, subtract_8(multiply_16(low_nibbles(bytes), twice), zero));
        store_ints(at + 4 * PANEL, subtract_8(multiply_16(high_nibbles(bytes), twice), zero));
      }
    }
}

// The same without numbers of the int8 layer: those of 4 bits are summed up, and only a group's sum is multiplied.
static void linear_of_nibbles(const void* x, const Panels& all, const int8_t* factor, const float* scale,
                              const bfloat16* right, const float* bias, void* out, int64_t rows, int64_t inputs,
                              int64_t padded, int64_t features, int64_t threads, bool narrow_in, bool narrow_out) {
  static thread_local std::vector<uint32_t> kept_q;
  static thread_local std::vector<float> kept_scales, kept_parts;
  static thread_local std::vector<int32_t> kept_sums, kept_begin;
  const int64_t groups = padded / GROUP, panels = (features + PANEL - 1) / PANEL;
  const RowBlocks blocks(rows, MOST_ROWS_INT4);
  uint32_t* q = scratch(kept_q, rows * padded / 4);
  float *scales = scratch(kept_scales, rows), *parts = scratch(kept_parts, rows * RANK);
  // Of each group, the sum of its activations and what its products' sum begins with.
  int32_t *activations = scratch(kept_sums, rows * groups), *begin = scratch(kept_begin, rows * groups);
  quantize_rows<uint32_t>(x, narrow_in, blocks, q, scales, activations, 1, right, parts, inputs, padded, GROUP,
                          threads);
  const Results results{out, scale, bias, scales, parts, features, narrow_out};
  for (int64_t i = 0; i < rows * groups; i++) {
    begin[i] = nibble_begin(-8 * activations[i]);
    activations[i] <<= 16;
  }
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint8_t* w = all.at(panel);
    const bfloat16* left = all.left(panel);
    const int8_t* f = factor + panel * groups * 2 * PANEL;
    for (int64_t row = 0; row < rows; row += blocks.height)
      with_count<MOST_ROWS_INT4>(blocks.rows_in(row), [&]<int ROWS>() {
        constexpr int WIDE = width(ROWS);
        const Placed<uint32_t, ROWS> tokens(q + row * padded / 4, padded / 4);
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
              for (int v = 0; v < WIDE; v++) whole[r][v] = broadcast(begin[(row + r) * groups + g]);
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
                const uint32_t* token = tokens.from + r * tokens.row_step + i / 4 * tokens.unit_step;
                const Ints first_four = broadcast(unit_at(token));
                const Ints last_four = broadcast(unit_at(token + tokens.unit_step));
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
                const Ints sum = broadcast(activations[(row + r) * groups + g]);
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

extern "C" void muster_linear_int4(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                                   const bfloat16* right, const float* bias, void* out, int64_t rows, int64_t inputs,
                                   int64_t padded, int64_t features, int64_t threads, int64_t narrow_in,
                                   int64_t narrow_out) {
  if (rows == 0) return;
  const Panels all{weight, padded * (PANEL / 2), right != nullptr};
  if (PARTS<int8_t> > 1 || rows < for_whole())
    return linear_of_nibbles(x, all, factor, scale, right, bias, out, rows, inputs, padded, features, threads,
                             narrow_in, narrow_out);
  linear_of_whole(x, all, scale, right, bias, out, rows, inputs, padded, features, threads, narrow_in, narrow_out, 1,
                  [&](const auto& blocks, const uint32_t* q, int64_t panel, const uint8_t* w, const auto& finish) {
    static thread_local std::vector<uint8_t> kept;
    uint8_t* whole = scratch(kept, padded * PANEL);
    expand(w, factor + panel * padded / GROUP * 2 * PANEL, padded, whole);
    multiply_panel<int8_t>(blocks, q, whole, padded / 4, w, padded * PANEL / 2, finish);
  });
}
