// Maths: z = x w^T + b in float32; y = z (1 + erf(z / sqrt 2)) / 2, or z / (1 + e^(-2u)) with u =
// sqrt(2 / pi) (z + 0.044715 z^3), rounded once.
// Memory: w crosses HBM once, 16 bytes a lane, kOutputs rows at a time; x, a few rows, comes from
// the caches. With so few rows reading w is the cost: at most kRows products for each element.
// Grid: a warp for each kOutputs outputs; its lanes go along the inputs.
// Bits: each output is summed by one warp in one order, whatever the batch's other rows.
#pragma once

#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "linear_gelu.h"

namespace linear_gelu {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// With kRows sums each; those of 16 rows would not leave registers for loads.
constexpr int outputs_of(int rows) { return rows == 16 ? 2 : 4; }

GPU_DEVICE float gelu(float z, bool by_tanh) {
  if (!by_tanh) return 0.5f * z * (1.0f + gpu_erf(z * 0.70710678118654752f));
  // For large |z| the power goes to 0 or to infinity, and both give the right limit.
  const float u = 0.79788456080286536f * (z + 0.044715f * z * z * z);
  return z / (1.0f + gpu_exp2(-2.0f * 1.4426950408889634f * u));
}

template <typename T, int kRows>
GPU_KERNEL(kThreads) linear_gelu_kernel(GPU_CONSTANT LinearGeluArgs a) {
  constexpr int kPer = kPerChunk<T>;
  constexpr int kOutputs = outputs_of(kRows);
  static_assert(kRows * kOutputs <= 32, "a lane finishes one element");
  const int lane = threadIdx.x % 32;
  const int first = (static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32) * kOutputs;
  if (first >= a.outputs) return;  // the whole warp

  // 1. Each lane's share of every dot product. Outputs past the last repeat it, and are dropped.
  float sums[kRows][kOutputs] = {};
#pragma unroll 2
  for (int col = lane * kPer; col < a.inputs; col += 32 * kPer) {
    uint4 raw[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t output = min(first + o, a.outputs - 1);
      raw[o] = gpu_load16_streaming(static_cast<const T*>(a.w) + output * a.w_stride + col);
    }
    float w[kOutputs][kPer];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) unpack<T>(raw[o], w[o]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= a.rows) break;
      float x[kPer];
      unpack<T>(gpu_load16(static_cast<const T*>(a.x) + r * a.x_stride + col), x);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) sums[r][o] += x[i] * w[o][i];
      }
    }
  }

  // 2. The lanes' shares together; lane r * kOutputs + o keeps element (r, o).
  float z = 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float sum = sum_lanes<32>(sums[r][o]);
      if (lane == r * kOutputs + o) z = sum;
    }
  }

  // 3. Bias, GELU, store.
  const int row = lane / kOutputs;
  const int output = first + lane % kOutputs;
  if (row >= min(kRows, a.rows) || output >= a.outputs) return;
  if (a.b != nullptr) z += to_float(static_cast<const T*>(a.b)[output]);
  static_cast<T*>(a.y)[static_cast<int64_t>(row) * a.outputs + output] =
      from_float<T>(gelu(z, a.by_tanh));
}

}  // namespace linear_gelu
