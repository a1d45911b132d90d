// All layers of a network in one call: the other files' operations in the order of `network.py`, so that what comes
// out is the same bits, without the tenths of a millisecond that going through Python between them takes.
//
// What lies between two operations is in two rooms that the thread keeps from call to call, of as many rows as its
// largest step had: one of max(width, H D, F) numbers a row, one of max((H + 2 K) D, 2 F).
#include "operations.h"

namespace {

enum Format : int64_t { FLOAT, INT8, INT4 };

// These four are filled in by `stack.py`, field by field.
struct Linear {
  int64_t format;
  const void *weight, *scale;
  const float* bias;
  int64_t inputs, padded, features, group;

  void operator()(const void* x, void* out, int64_t rows, int64_t threads, int64_t narrow) const {
    if (format == INT8)
      muster_linear_int8(x, static_cast<const uint8_t*>(weight), static_cast<const float*>(scale), bias, out, rows,
                         inputs, padded, features, threads, narrow, narrow);
    else if (format == INT4)
      muster_linear_int4(x, static_cast<const uint8_t*>(weight), static_cast<const bfloat16*>(scale), bias, out, rows,
                         inputs, padded, features, group, threads, narrow, narrow);
    else
      muster_linear_float(x, static_cast<const uint32_t*>(weight), bias, out, rows, inputs / (narrow ? 2 : 1),
                          features, threads, narrow, narrow);
  }
};

struct Layer {
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
  double eps, qk_eps;
  Linear qkv, o, gate_up, down;
};

struct Stack {
  const Layer* layers;
  int64_t count, width, heads, kv_heads, dim, window, narrow;
};

struct Cache {
  void *const *keys, *const *values;  // one each a layer
  int64_t block_tokens, quantized;
};

}  // namespace

// x (rows, width) is changed; `residual`, of the same shape, receives what is still to be added to it.
extern "C" void muster_layers(const Stack* stack, const Cache* cache, void* x, void* residual, const float* cos,
                              const float* sin, const int64_t* slots, const int64_t* starts, const int64_t* lengths,
                              const int64_t* table, int64_t rows, int64_t sequences, int64_t table_width,
                              int64_t threads) {
  static thread_local std::vector<uint8_t> kept_slim, kept_wide;
  const auto [layers, count, width, heads, kv_heads, dim, window, narrow] = *stack;
  const int64_t row_bytes = rows * (narrow ? 2 : 4);
  for (int64_t i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    const int64_t ffn = layer.down.inputs;
    uint8_t* slim = scratch(kept_slim, row_bytes * std::max({width, heads * dim, ffn}));
    uint8_t* wide = scratch(kept_wide, row_bytes * std::max(layer.qkv.features, 2 * ffn));
    muster_add_norm(x, i ? residual : nullptr, layer.attention_norm, slim, rows, width, layer.eps, threads, narrow);
    layer.qkv(slim, wide, rows, threads, narrow);
    muster_rotate_store(wide, cos, sin, layer.q_norm, layer.k_norm, layer.qk_eps, slots, cache->keys[i], cache->values[i], rows,
                        heads, kv_heads, dim, cache->block_tokens, threads, narrow, cache->quantized);
    muster_attend(wide, starts, lengths, table, cache->keys[i], cache->values[i], slim, sequences, heads, kv_heads, dim,
                  cache->block_tokens, table_width, window, threads, narrow, cache->quantized);
    layer.o(slim, residual, rows, threads, narrow);
    muster_add_norm(x, residual, layer.mlp_norm, slim, rows, width, layer.eps, threads, narrow);
    layer.gate_up(slim, wide, rows, threads, narrow);
    muster_swiglu(wide, slim, rows, ffn, threads, narrow);
    layer.down(slim, residual, rows, threads, narrow);
  }
}
