// One header for every kernel: CUDA under nvcc, the host engine under g++.
//
// CUDA's own names stay (threadIdx, __syncthreads, __shfl_xor_sync, atomicOr, …). What a CPU cannot
// spell the same way is a wrapper here with the same meaning on both sides: launching, shared
// memory, 16-byte accesses, asynchronous and bulk copies, barriers in memory, named barriers, the
// grid's barrier, acquire and release, and a few maths functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

// GPU_ARCH: __CUDA_ARCH__, and 0 in nvcc's pass for the host; tests choose it for the host engine.
// Bulk copies exist from sm_90 on.
#if defined(__CUDA_ARCH__)
#define GPU_ARCH __CUDA_ARCH__
#elif defined(__CUDACC__)
#define GPU_ARCH 0
#endif

// What a launch may ask for besides threads.
struct GpuLaunch {
  int64_t blocks;
  int threads;
  void* stream;
  int shared_bytes;  // for GPU_DYN_SHARED
  bool cooperative;  // all blocks are resident at once: gpu_grid_sync() may be called
};

#ifndef __CUDACC__
#include "host/device_names.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#define GPU_DEVICE __device__ __forceinline__
#define GPU_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GPU_CONSTANT __grid_constant__ const
#define GPU_SHARED(type, name, count) __shared__ __align__(16) type name[count]
// The bytes that the launch asked for; a kernel has one such array.
#define GPU_DYN_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char gpu_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(gpu_dynamic_shared)

// 16-byte accesses. Both addresses must be multiples of 16.
GPU_DEVICE uint4 gpu_load16(const void* from) { return *static_cast<const uint4*>(from); }
// For data that is read once: it leaves the caches first.
GPU_DEVICE uint4 gpu_load16_streaming(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
GPU_DEVICE void gpu_store16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

GPU_DEVICE unsigned gpu_shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory without waiting (sm_80 and above; below, at once).
GPU_DEVICE void gpu_copy16_async(void* to_shared, const void* from) {
#if GPU_ARCH >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(gpu_shared_address(to_shared)),
               "l"(from)
               : "memory");
#else
  gpu_store16(to_shared, gpu_load16(from));
#endif
}
GPU_DEVICE void gpu_copies_commit() {
#if GPU_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's newest commits are still under way. Only this
// thread may then read what they copied, until a barrier.
template <int pending>
GPU_DEVICE void gpu_copies_wait() {
#if GPU_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

#if GPU_ARCH >= 900
// Bulk copies read and write shared memory by a proxy of their own. A thread that stored to
// shared memory lets that proxy know before a barrier, where a bulk copy to there may follow.
GPU_DEVICE void gpu_fence_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier in shared memory: a phase ends when `arrivals` threads have arrived and all bytes that
// they said to expect are there. One thread makes it; others use it after a barrier.
GPU_DEVICE void gpu_mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gpu_shared_address(barrier)),
               "r"(arrivals)
               : "memory");
  gpu_fence_bulk_copies();
}
GPU_DEVICE void gpu_mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(
                   gpu_shared_address(barrier))
               : "memory");
}
GPU_DEVICE void gpu_mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   gpu_shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until phase number `phase` has ended; only its last bit counts.
GPU_DEVICE void gpu_mbarrier_wait(uint64_t* barrier, unsigned phase) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(gpu_shared_address(barrier)), "r"(phase & 1)
        : "memory");
  }
}

// Copies a multiple of 16 bytes to shared memory; they count for the barrier as they come. Both
// addresses are multiples of 16.
GPU_DEVICE void gpu_copy_bulk(void* to_shared, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(gpu_shared_address(to_shared)),
      "l"(from), "r"(bytes), "r"(gpu_shared_address(barrier))
      : "memory");
}
#endif

// A barrier of `threads` threads (whole warps) of the block; `id` from 1 to 15.
GPU_DEVICE void gpu_named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Everything before a release is seen by who acquires what it stored, anywhere on the device.
GPU_DEVICE int gpu_load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
GPU_DEVICE void gpu_store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// A barrier of all blocks of a cooperative launch.
GPU_DEVICE void gpu_grid_sync() { cooperative_groups::this_grid().sync(); }

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
void gpu_launch(const GpuLaunch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.shared_bytes > 0) {
    gpu_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   how.shared_bytes),
              "dynamic shared memory");
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(how.blocks);
  config.blockDim = static_cast<unsigned>(how.threads);
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &cooperative;
  config.numAttrs = how.cooperative ? 1 : 0;
  // A kernel that the driver cannot run is told by name, and the context survives.
  gpu_check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "kernel launch");
}
#endif

template <typename... Parameters, typename... Arguments>
void gpu_launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                Arguments... arguments) {
  gpu_launch({blocks, threads, stream, 0, false}, kernel, arguments...);
}
