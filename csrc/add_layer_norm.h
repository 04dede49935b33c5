// LayerNorm(dropout(x) + residual); plain C++ for the bindings.
#pragma once

#include <stdint.h>

#include "dtype.h"

// The widest row that registers hold.
constexpr int kMaxNormWidth = 8192;

// x, residual [R, E] with row strides in elements; addresses, strides and E are multiples of 16
// bytes. y and sum are contiguous.
struct AddLayerNormArgs {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [E]
  const void* bias;      // [E], or null
  void* y;
  void* sum;             // or null
  const int64_t* seed_at;  // where the seed lies on the device; or null: it is `seed`
  int64_t seed;
  int64_t rows, x_stride, residual_stride;
  int64_t drop_below;  // floor(p * 2^32): an element is dropped where its word is below; 0: none
  float keep_scale;    // 1 / (1 - p)
  float eps;
  int width;
  bool wide_weights;  // weight and bias are float32 beside half x
  Dtype dtype;
};

// Throws std::runtime_error where the driver or the launch fails.
void launch_add_layer_norm(const AddLayerNormArgs& args, void* stream);
