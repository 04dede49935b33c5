// One header for every kernel: CUDA under nvcc, the host engine under g++.
//
// CUDA's own names stay (threadIdx, __syncthreads, __shfl_xor_sync, atomicOr, …). What a CPU cannot
// spell the same way is a wrapper here with the same meaning on both sides: launching, shared
// memory, 16-byte accesses, asynchronous copies and a few maths functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#ifndef __CUDACC__
#include "host/device_names.h"
#else
#include <cuda_runtime.h>

#define GPU_DEVICE __device__ __forceinline__
#define GPU_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GPU_CONSTANT __grid_constant__ const
#define GPU_SHARED(type, name, count) __shared__ __align__(16) type name[count]

// 16-byte accesses. Both addresses must be multiples of 16.
GPU_DEVICE uint4 gpu_load16(const void* from) { return *static_cast<const uint4*>(from); }
// For data that is read once: it leaves the caches first.
GPU_DEVICE uint4 gpu_load16_streaming(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
GPU_DEVICE void gpu_store16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// Copies 16 bytes to shared memory, or zeros where !valid, without waiting (sm_80 and above; below,
// the copy is done at once). `from` must be a readable address even where !valid.
GPU_DEVICE void gpu_copy16_async(void* to_shared, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  gpu_store16(to_shared, valid ? gpu_load16(from) : uint4{0, 0, 0, 0});
#endif
}
GPU_DEVICE void gpu_copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's newest commits are still under way. Only this
// thread may then read what they copied, until a barrier.
template <int pending>
GPU_DEVICE void gpu_copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

GPU_DEVICE float gpu_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPU_DEVICE float gpu_log(float x) { return logf(x); }
GPU_DEVICE float gpu_erf(float x) { return erff(x); }
GPU_DEVICE float gpu_sqrt(float x) { return sqrtf(x); }

inline void gpu_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
      status == cudaErrorInitializationError) {
    message += " (no usable NVIDIA driver or device on this machine)";
  } else if (status == cudaErrorNoKernelImageForDevice) {
    message += " (built for other architectures: set BERTGPT_CUDA_ARCHS and build again)";
  }
  throw std::runtime_error(message);
}

inline int gpu_multiprocessors() {
  int device = 0;
  int count = 0;
  gpu_check(cudaGetDevice(&device), "CUDA driver");
  gpu_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "CUDA driver");
  return count;
}

template <typename... Parameters, typename... Arguments>
void gpu_launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                Arguments... arguments) {
  // A kernel that the driver cannot run is told by name, and the context survives.
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  gpu_check(cudaGetLastError(), "kernel launch");
}
#endif
