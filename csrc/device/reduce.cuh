// Reductions over a warp in one fixed order, so that repeats agree bit for bit.
#pragma once

#include "gpu.cuh"

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over each aligned group of `lanes` lanes, in every lane.
template <int lanes>
GPU_DEVICE float sum_lanes(float value) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, offset);
  }
  return value;
}
