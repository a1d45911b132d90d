// x (rows, units) times weights in fp32 or bf16, laid out in panels [panel][unit, filled up to `padded`][32 features].
#include "operations.h"
#include "parallel.h"
#include "tiles.h"

template <class T, class Blocks>
static void linear(const Blocks& blocks, const void* x, const uint32_t* weight, const float* bias, void* out,
                   int64_t units, int64_t padded, int64_t features, int64_t threads, bool narrow) {
  static thread_local std::vector<uint32_t> kept;
  uint32_t* placed = scratch(kept, blocks.template room<T>(padded));
  parallel_for(blocks.count(), 1, blocks.rows >= 64 ? threads : 1, [&](int64_t block) {
    const int64_t row = block * blocks.height;
    blocks.template place<T>(row, static_cast<const uint32_t*>(x) + row * units, units, padded, placed);
  });
  const int64_t panels = (features + PANEL - 1) / PANEL;
  parallel_for(panels, run_of(panels, threads), threads, [&](int64_t panel) {
    const uint32_t* w = weight + panel * padded * PANEL;
    multiply_panel<T>(blocks, placed, w, padded, w, padded * PANEL * 4,
                      [=, from = panel * PANEL](int64_t row, int64_t c, Floats sum) {
      if (bias) sum = sum + load(bias + from + c);
      store(out, row * features + from + c, sum, first(features - from - c), narrow);
    });
  });
}

extern "C" void muster_linear_float(const void* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                                    int64_t units, int64_t padded, int64_t features, int64_t threads,
                                    int64_t narrow_in, int64_t narrow_out) {
  if (rows == 0) return;
  auto run = [&]<class T>(const auto& blocks) {
    linear<T>(blocks, x, weight, bias, out, units, padded, features, threads, narrow_out);
  };
  if (narrow_in)
    with_blocks(rows, 1, [&](const auto& blocks) { run.template operator()<bfloat16>(blocks); });
  else
    run.template operator()<float>(RowBlocks(rows));
}
