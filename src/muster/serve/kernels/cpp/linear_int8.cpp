// W8A8: weights in 8 bits with a scale for each output feature, activations in 8 bits with a scale for each row.
// Panels [panel][4 inputs][32 features][4]: what VNNI's dpbusd multiplies, 128 more than the weights. Where there is a
// `right`, `low_rank.h` says what it is, and what lies behind each panel.
#include "operations.h"
#include "quantize.h"

// From so many rows on, tiles are faster. The results are the same.
constexpr int64_t FOR_TILES = 8;

extern "C" void muster_linear_int8(const void* x, const uint8_t* weight, const float* scale, const bfloat16* right,
                                   const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded,
                                   int64_t features, int64_t threads, int64_t narrow_in, int64_t narrow_out) {
  if (rows == 0) return;
  const Panels all{weight, padded * PANEL, right != nullptr};
  linear_of_whole(x, all, scale, right, bias, out, rows, inputs, padded, features, threads, narrow_in, narrow_out,
                  FOR_TILES, [&](const auto& blocks, const uint32_t* q, int64_t, const uint8_t* w, const auto& finish) {
    multiply_panel<int8_t>(blocks, q, w, padded / 4, w, padded * PANEL, finish);
  });
}

// Whether tiles are used: there is what they need, and the system lets this process have them.
extern "C" int32_t muster_has_tiles() { return have_tiles(); }
