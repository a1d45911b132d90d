// What stands between the matrix products: residual sum with RMSNorm, SwiGLU's product, rotation and storing into
// pages. Rows are tokens; sums are in fp32 whatever the type.
#include <cmath>

#include "operations.h"
#include "pages.h"
#include "parallel.h"

// Below this many numbers, waking another core takes longer than the work.
constexpr int64_t WORTH_SHARING = 1 << 15;

// x += residual (where given); out = x / sqrt(mean(x^2) + eps) * weight.
template <class T>
static void add_norm(T* x, const T* residual, const float* weight, T* out, int64_t rows, int64_t width, float eps,
                     int64_t threads) {
  parallel_for(rows, 4, rows * width > WORTH_SHARING ? threads : 1, [&](int64_t row) {
    T* at = x + row * width;
    Floats sum = broadcast(0.f);
    for (int64_t i = 0; i < width; i += 16) {
      const Lanes lanes = first(width - i);
      if (residual) store(at + i, load(at + i, lanes) + load(residual + row * width + i, lanes), lanes);
      const Floats value = load(at + i, lanes);  // as it was rounded
      sum = fmadd(value, value, sum);
    }
    const Floats inverse = broadcast(1.f / std::sqrt(sum_of(sum) / width + eps));
    for (int64_t i = 0; i < width; i += 16) {
      const Lanes lanes = first(width - i);
      const Floats value = load(at + i, lanes) * inverse;
      store(out + row * width + i, value * load(weight + i, lanes), lanes);
    }
  });
}

// silu(gate) * up of rows that hold both, gate first.
template <class T>
static void swiglu(const T* gate_up, T* out, int64_t rows, int64_t width, int64_t threads) {
  const Floats one = broadcast(1.f);
  parallel_for(rows, 4, rows * width > WORTH_SHARING ? threads : 1, [&](int64_t row) {
    for (int64_t i = 0; i < width; i += 16) {
      const Lanes lanes = first(width - i);
      const T* at = gate_up + row * 2 * width + i;
      const Floats gate = load(at, lanes), up = load(at + width, lanes);
      const Floats below = one + exponential(broadcast(0.f) - gate);
      store(out + row * width + i, gate / below * up, lanes);
    }
  });
}

// One head, in place: RMSNorm over its dimensions (where weights are given), then the rotation of dimension i together
// with i + D/2 (where angles are given).
template <class T>
static void turn(T* head, int64_t dim, const float* weight, float eps, const float* cos, const float* sin) {
  float inverse = 1.f;
  if (weight) {
    Floats sum = broadcast(0.f);
    for (int64_t i = 0; i < dim; i += 16) {
      const Floats value = load(head + i, first(dim - i));
      sum = fmadd(value, value, sum);
    }
    inverse = 1.f / std::sqrt(sum_of(sum) / dim + eps);
  }
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const Lanes lanes = first(half - i);
    Floats low = load(head + i, lanes), high = load(head + half + i, lanes);
    if (weight) {
      low = low * broadcast(inverse) * load(weight + i, lanes);
      high = high * broadcast(inverse) * load(weight + half + i, lanes);
    }
    if (cos) {
      const Floats c = load(cos + i, lanes), s = load(sin + i, lanes);  // both halves have the same angles
      const Floats turned = fmsub(low, c, high * s);
      high = fmadd(high, c, low * s);
      low = turned;
    }
    store(head + i, low, lanes);
    store(head + half + i, high, lanes);
  }
}

// Queries of qkv (rows, (H + 2 K) D) are turned where they lie; keys are turned and, like values, put at their slots
// of the pages (blocks, K, block_tokens, D).
template <class T, class S>
static void rotate_store(T* qkv, const float* cos, const float* sin, const float* q_weight, const float* k_weight,
                         float eps, const int64_t* slots, S* keys, S* values, int64_t rows, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int64_t threads) {
  const int64_t width = (heads + 2 * kv_heads) * dim;
  parallel_for(rows, 4, rows * width > WORTH_SHARING ? threads : 1, [&](int64_t row) {
    T* token = qkv + row * width;
    const float *c = cos ? cos + row * dim : nullptr, *s = sin ? sin + row * dim : nullptr;
    if (c || q_weight)
      for (int64_t h = 0; h < heads + kv_heads; h++)
        turn(token + h * dim, dim, h < heads ? q_weight : k_weight, eps, c, s);
    const int64_t block = slots[row] / block_tokens, offset = slots[row] % block_tokens;
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t to = ((block * kv_heads + h) * block_tokens + offset) * row_numbers<S>(dim);
      put_row(token + (heads + h) * dim, keys + to, dim);
      put_row(token + (heads + kv_heads + h) * dim, values + to, dim);
    }
  });
}

extern "C" {
void muster_add_norm(void* x, const void* residual, const float* weight, void* out, int64_t rows, int64_t width,
                     double eps, int64_t threads, int64_t narrow) {
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_norm(static_cast<T*>(x), static_cast<const T*>(residual), weight, static_cast<T*>(out), rows, width,
             static_cast<float>(eps), threads);
  };
  narrow ? run(static_cast<bfloat16*>(x)) : run(static_cast<float*>(x));
}

void muster_swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int64_t threads, int64_t narrow) {
  if (narrow)
    swiglu(static_cast<const bfloat16*>(gate_up), static_cast<bfloat16*>(out), rows, width, threads);
  else
    swiglu(static_cast<const float*>(gate_up), static_cast<float*>(out), rows, width, threads);
}

void muster_rotate_store(void* qkv, const float* cos, const float* sin, const float* q_weight, const float* k_weight,
                         double eps, const int64_t* slots, void* keys, void* values, int64_t rows, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int64_t threads, int64_t narrow,
                         int64_t quantized) {
  with_types(narrow, quantized, [&]<class T, class S>() {
    rotate_store(static_cast<T*>(qkv), cos, sin, q_weight, k_weight, static_cast<float>(eps), slots,
                 static_cast<S*>(keys), static_cast<S*>(values), rows, heads, kv_heads, dim, block_tokens, threads);
  });
}
}
