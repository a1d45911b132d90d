// The operations that other files define and `layers.cpp` puts together.
#pragma once
#include "vector.h"

extern "C" {
void muster_linear_float(const void* x, const uint32_t* weight, const float* bias, void* out, int64_t rows,
                         int64_t units, int64_t padded, int64_t features, int64_t threads, int64_t narrow_in,
                         int64_t narrow_out);
void muster_linear_int8(const void* x, const uint8_t* weight, const float* scale, const bfloat16* right,
                        const float* bias, void* out, int64_t rows, int64_t inputs, int64_t padded, int64_t features,
                        int64_t threads, int64_t narrow_in, int64_t narrow_out);
void muster_linear_int4(const void* x, const uint8_t* weight, const int8_t* factor, const float* scale,
                        const bfloat16* right, const float* bias, void* out, int64_t rows, int64_t inputs,
                        int64_t padded, int64_t features, int64_t threads, int64_t narrow_in, int64_t narrow_out);
void muster_add_norm(void* x, const void* residual, const float* weight, void* out, int64_t rows, int64_t width,
                     double eps, int64_t threads, int64_t narrow);
void muster_swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int64_t threads, int64_t narrow);
void muster_rotate_store(void* qkv, const float* cos, const float* sin, const float* q_weight, const float* k_weight,
                         double eps, const int64_t* slots, void* keys, void* values, int64_t rows, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int64_t threads, int64_t narrow,
                         int64_t quantized);
void muster_attend(const void* qkv, const int64_t* starts, const int64_t* lengths, const int64_t* table,
                   const void* keys, const void* values, void* out, int64_t sequences, int64_t heads, int64_t kv_heads,
                   int64_t dim, int64_t block_tokens, int64_t table_width, int64_t window, int64_t threads,
                   int64_t narrow, int64_t quantized);
}
