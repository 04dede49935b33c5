// 16 bytes of a row at a time, as float32 in registers.
#pragma once

#include "gpu.cuh"

template <typename T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));

GPU_DEVICE float to_float(float value) { return value; }
GPU_DEVICE float to_float(__half value) { return __half2float(value); }
GPU_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
GPU_DEVICE T from_float(float value);
template <>
GPU_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
GPU_DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
GPU_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
GPU_DEVICE void unpack(const uint4& chunk, float (&values)[kPerChunk<T>]) {
  const T* elements = reinterpret_cast<const T*>(&chunk);
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) values[i] = to_float(elements[i]);
}

template <typename T>
GPU_DEVICE uint4 pack(const float (&values)[kPerChunk<T>]) {
  uint4 chunk;
  T* elements = reinterpret_cast<T*>(&chunk);
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) elements[i] = from_float<T>(values[i]);
  return chunk;
}

// Index tensors come as int32 or int64.
struct IndexArray {
  const void* data;
  int64_t stride;
  bool wide;
};
GPU_DEVICE int64_t load_index(const IndexArray& indices, int64_t i) {
  const int64_t at = i * indices.stride;
  return indices.wide ? __ldg(static_cast<const int64_t*>(indices.data) + at)
                      : __ldg(static_cast<const int32_t*>(indices.data) + at);
}
