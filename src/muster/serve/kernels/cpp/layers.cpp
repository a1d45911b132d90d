// A step of a network in one call: the other files' operations in the order of `network.py`, so that what comes out is
// the same bits, without the tenths of a millisecond that going through Python between them takes. Right after weights
// have gone through the caches, every line of Python there costs several times what it does in a loop.
//
// What lies between two operations is in rooms that the thread keeps from call to call, of as many rows as its largest
// step had: 2 width + max(width, H D, F) + max((H + 2 K) D, 2 F) numbers and 2 D angles a row, and 3 width numbers a
// wanted row.
#include "operations.h"

namespace {

enum Format : int64_t { FLOAT, INT8, INT4 };

// These are filled in by `stack.py`, field by field.
struct Linear {
  int64_t format;
  const void* weight;
  const int8_t* factor;
  const float* scale;
  const bfloat16* right;
  const float* bias;
  int64_t inputs, padded, features;

  void operator()(const void* x, void* out, int64_t rows, int64_t threads, int64_t narrow, int64_t narrow_out) const {
    const auto* bytes = static_cast<const uint8_t*>(weight);
    if (format == INT8)
      muster_linear_int8(x, bytes, scale, right, bias, out, rows, inputs, padded, features, threads, narrow,
                         narrow_out);
    else if (format == INT4)
      muster_linear_int4(x, bytes, factor, scale, right, bias, out, rows, inputs, padded, features, threads,
                         narrow, narrow_out);
    else
      muster_linear_float(x, static_cast<const uint32_t*>(weight), bias, out, rows, inputs / (narrow ? 2 : 1),
                          padded / (narrow ? 2 : 1), features, threads, narrow, narrow_out);
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
  const float *cos, *sin;  // (positions, D / 2), of at least as many positions as a batch's table has room for
  const void* embed;       // (vocab, width), and what follows the layers; where it is this rank that has them
  const float* norm;
  double eps;
  Linear head;

  int64_t row_bytes() const { return width * (narrow ? 2 : 4); }
};

struct Cache {
  void *const *keys, *const *values;  // one each a layer
  int64_t block_tokens, quantized;
};

struct Batch {
  const int64_t *tokens, *slots, *starts, *lengths, *table, *wanted;
  int64_t rows, sequences, table_width, wanted_rows, threads;
};

// The angles of each row's position: (rows, D), of which the first halves are read. New tokens are a sequence's last.
void find_angles(const Batch& batch, int64_t dim, const float* table, float* angles) {
  for (int64_t s = 0; s < batch.sequences; s++)
    for (int64_t row = batch.starts[s]; row < batch.starts[s + 1]; row++)
      std::memcpy(angles + row * dim, table + (batch.lengths[s] - batch.starts[s + 1] + row) * (dim / 2),
                  dim / 2 * sizeof(float));
}

// to[i] = from[which[i]], of rows.
void gather(const uint8_t* from, const int64_t* which, int64_t count, int64_t row_bytes, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) std::memcpy(to + i * row_bytes, from + which[i] * row_bytes, row_bytes);
}

// x (rows, width) is changed; `residual`, of the same shape, receives what is still to be added to it.
void through(const Stack& stack, const Cache& cache, const Batch& batch, void* x, void* residual) {
  static thread_local std::vector<uint8_t> kept_slim, kept_wide;
  static thread_local std::vector<float> kept_cos, kept_sin;
  const int64_t width = stack.width, heads = stack.heads, kv_heads = stack.kv_heads, dim = stack.dim;
  const int64_t narrow = stack.narrow, rows = batch.rows, threads = batch.threads;
  const int64_t column_bytes = rows * (narrow ? 2 : 4);
  float *cos = scratch(kept_cos, rows * dim), *sin = scratch(kept_sin, rows * dim);
  find_angles(batch, dim, stack.cos, cos);
  find_angles(batch, dim, stack.sin, sin);
  for (int64_t i = 0; i < stack.count; i++) {
    const Layer& layer = stack.layers[i];
    const int64_t ffn = layer.down.inputs;
    uint8_t* slim = scratch(kept_slim, column_bytes * std::max({width, heads * dim, ffn}));
    uint8_t* wide = scratch(kept_wide, column_bytes * std::max(layer.qkv.features, 2 * ffn));
    muster_add_norm(x, i ? residual : nullptr, layer.attention_norm, slim, rows, width, layer.eps, threads, narrow);
    layer.qkv(slim, wide, rows, threads, narrow, narrow);
    muster_rotate_store(wide, cos, sin, layer.q_norm, layer.k_norm, layer.qk_eps, batch.slots, cache.keys[i],
                        cache.values[i], rows, heads, kv_heads, dim, cache.block_tokens, threads, narrow,
                        cache.quantized);
    muster_attend(wide, batch.starts, batch.lengths, batch.table, cache.keys[i], cache.values[i], slim, batch.sequences,
                  heads, kv_heads, dim, cache.block_tokens, batch.table_width, stack.window, threads, narrow,
                  cache.quantized);
    layer.o(slim, residual, rows, threads, narrow, narrow);
    muster_add_norm(x, residual, layer.mlp_norm, slim, rows, width, layer.eps, threads, narrow);
    layer.gate_up(slim, wide, rows, threads, narrow, narrow);
    muster_swiglu(wide, slim, rows, ffn, threads, narrow);
    layer.down(slim, residual, rows, threads, narrow, narrow);
  }
}

}  // namespace

extern "C" {
void muster_layers(const Stack* stack, const Cache* cache, const Batch* batch, void* x, void* residual) {
  through(*stack, *cache, *batch, x, residual);
}

// fp32 logits (wanted rows, vocab).
void muster_logits(const Stack* stack, const Cache* cache, const Batch* batch, float* logits) {
  static thread_local std::vector<uint8_t> kept_x, kept_residual, kept_wanted;
  const int64_t row_bytes = stack->row_bytes(), count = batch->wanted_rows;
  uint8_t *x = scratch(kept_x, batch->rows * row_bytes), *residual = scratch(kept_residual, batch->rows * row_bytes);
  uint8_t* wanted = scratch(kept_wanted, 3 * count * row_bytes);
  uint8_t *added = wanted + count * row_bytes, *hidden = added + count * row_bytes;
  gather(static_cast<const uint8_t*>(stack->embed), batch->tokens, batch->rows, row_bytes, x);
  through(*stack, *cache, *batch, x, residual);
  if (count == 0) return;
  gather(x, batch->wanted, count, row_bytes, wanted);
  gather(residual, batch->wanted, count, row_bytes, added);
  muster_add_norm(wanted, added, stack->norm, hidden, count, stack->width, stack->eps, batch->threads, stack->narrow);
  stack->head(hidden, logits, count, batch->threads, stack->narrow, 0);
}
}
