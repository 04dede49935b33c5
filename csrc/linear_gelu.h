// GELU(x w^T + b) for a few rows; plain C++ for the bindings.
#pragma once

#include <stdint.h>

#include "dtype.h"

constexpr int kMaxLinearRows = 16;

// x [M, E], w [F, E], row strides in elements; addresses, strides and E are multiples of 16 bytes.
// y is contiguous.
struct LinearGeluArgs {
  const void* x;
  const void* w;
  const void* b;  // [F], or null
  void* y;        // [M, F]
  int64_t x_stride, w_stride;
  int rows, inputs, outputs;
  bool by_tanh;  // GPT-2's form; otherwise by erf
  Dtype dtype;
};

// Throws std::runtime_error where the driver or the launch fails.
void launch_linear_gelu(const LinearGeluArgs& args, void* stream);
