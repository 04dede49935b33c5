// Maths: s = dropout(x) + r;  mu = sum s / E;  var = sum (s - mu)^2 / E;  y = (s - mu) / sqrt(var +
// eps) * w + b, in float32, rounded once. The variance is taken about the mean already found:
// sum s^2 - E mu^2 would cancel.
// Memory: x and r are read once, all of a row's loads under way before the first use; y (and s) are
// written once; w and b come from the L2.
// Grid: kWarps warps a row: one (four rows a block) up to 1,024 columns, eight up to 8,192.
// Dropout bits: word col % 4 of Philox counter (col / 4, row, row >> 32, 0).
#pragma once

#include "add_layer_norm.h"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"

namespace add_layer_norm {

constexpr int kValues = 32;  // of a row, in each thread's registers
constexpr int kNarrowRows = 4;  // rows a block where a warp takes each

constexpr int threads_of(int warps) { return 32 * (warps == 1 ? kNarrowRows : warps); }
constexpr int width_of(int warps) { return 32 * kValues * warps; }

// The sum over the threads of a row, in each of them.
template <int kWarps>
GPU_DEVICE float sum_row(float value, float* partial) {
  value = sum_lanes<32>(value);
  if (kWarps == 1) return value;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w];
  return sum;
}

template <typename T>
GPU_DEVICE void load_parameter(const void* from, int col, bool wide, float (&to)[kPerChunk<T>]) {
  if (!wide) {
    unpack<T>(gpu_load16(static_cast<const T*>(from) + col), to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) to[i] = __ldg(static_cast<const float*>(from) + col + i);
}

template <typename T>
GPU_DEVICE void drop(const AddLayerNormArgs& a, uint64_t seed, int64_t row, int col,
                     float (&values)[kPerChunk<T>]) {
  constexpr int kPer = kPerChunk<T>;
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    const uint4 words = philox(seed, uint4{static_cast<unsigned>(col + i) / 4,
                                           static_cast<unsigned>(row),
                                           static_cast<unsigned>(row >> 32), 0});
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[i + j] = word[j] >= a.drop_below ? values[i + j] * a.keep_scale : 0.0f;
    }
  }
}

template <typename T, int kWarps>
GPU_KERNEL(threads_of(kWarps)) add_layer_norm_kernel(GPU_CONSTANT AddLayerNormArgs a) {
  constexpr int kPer = kPerChunk<T>;
  constexpr int kChunks = kValues / kPer;
  constexpr int kRowThreads = 32 * kWarps;
  GPU_SHARED(float, sums, kWarps);
  GPU_SHARED(float, squares, kWarps);
  constexpr int kRows = threads_of(kWarps) / kRowThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
  if (row >= a.rows) return;  // a whole warp where kWarps is 1; never otherwise
  const int first = threadIdx.x % kRowThreads * kPer;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;

  // 1. The row: every load is on its way before the first is used.
  uint4 x_raw[kChunks];
  uint4 r_raw[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int col = first + c * kRowThreads * kPer;
    x_raw[c] = col < a.width ? gpu_load16_streaming(x + col) : uint4{0, 0, 0, 0};
    r_raw[c] = a.residual != nullptr && col < a.width ? gpu_load16_streaming(residual + col)
                                                      : uint4{0, 0, 0, 0};
  }

  // 2. The sum and its mean. Columns past E hold 0.
  float s[kChunks][kPer];
  float total = 0.0f;
  uint64_t seed = static_cast<uint64_t>(a.seed);
  if (a.seed_at != nullptr) seed = static_cast<uint64_t>(*a.seed_at);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int col = first + c * kRowThreads * kPer;
    float r[kPer];
    unpack<T>(x_raw[c], s[c]);
    unpack<T>(r_raw[c], r);
    if (a.drop_below > 0) drop<T>(a, seed, row, col, s[c]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      s[c][i] += r[i];
      total += s[c][i];
    }
    if (a.sum != nullptr && col < a.width) {
      gpu_store16(static_cast<T*>(a.sum) + row * a.width + col, pack<T>(s[c]));
    }
  }
  const float mean = sum_row<kWarps>(total, sums) / a.width;

  // 3. The variance about it.
  float square = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first + c * kRowThreads * kPer >= a.width) continue;
#pragma unroll
    for (int i = 0; i < kPer; ++i) square += (s[c][i] - mean) * (s[c][i] - mean);
  }
  const float variance = sum_row<kWarps>(square, squares) / a.width;
  const float scale = 1.0f / gpu_sqrt(variance + a.eps);

  // 4. Scale, shift, round, store.
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int col = first + c * kRowThreads * kPer;
    if (col >= a.width) continue;
    float w[kPer];
    load_parameter<T>(a.weight, col, a.wide_weights, w);
#pragma unroll
    for (int i = 0; i < kPer; ++i) s[c][i] = (s[c][i] - mean) * scale * w[i];
    if (a.bias != nullptr) {
      load_parameter<T>(a.bias, col, a.wide_weights, w);
#pragma unroll
      for (int i = 0; i < kPer; ++i) s[c][i] += w[i];
    }
    gpu_store16(static_cast<T*>(a.y) + row * a.width + col, pack<T>(s[c]));
  }
}

}  // namespace add_layer_norm
