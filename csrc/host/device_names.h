// CUDA's device names for g++: what kernels written against gpu.cuh call when a CPU runs them.
#pragma once

#include <math.h>
#include <string.h>

#include "host/engine.h"

// A raw __shared__ would silently be an ordinary variable: it must not compile.
#undef __shared__
#define __shared__ use_GPU_SHARED_for_shared_memory

#define GPU_DEVICE inline
#define GPU_KERNEL(...) void
#define GPU_CONSTANT const
#define GPU_SHARED(type, name, count)                                            \
  type* const name = static_cast<type*>(                                         \
      gpu_host::shared_memory(sizeof(type) * (count), gpu_host::Where::current()))
#define GPU_DYN_SHARED(type, name) \
  type* const name = static_cast<type*>(gpu_host::dynamic_shared_memory())

#define threadIdx (gpu_host::indices().thread)
#define blockIdx (gpu_host::indices().block)
#define blockDim (gpu_host::indices().threads)
#define gridDim (gpu_host::indices().blocks)

using gpu_host::Where;

inline void __syncthreads(Where where = Where::current()) { gpu_host::block_barrier(where); }

// Every lane's value, seen by each; the mask must name the whole warp.
template <typename T>
inline T gpu_host_exchange(unsigned mask, T value, int lane, Where where) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = gpu_host::warp_exchange(mask, bits, where)[lane & 31];
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, Where where = Where::current()) {
  return gpu_host_exchange(mask, value, lane, where);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, Where where = Where::current()) {
  return gpu_host_exchange(mask, value, gpu_host::lane() ^ bits, where);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int by, Where where = Where::current()) {
  const int lane = gpu_host::lane();
  return gpu_host_exchange(mask, value, lane < by ? lane : lane - by, where);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, Where where = Where::current()) {
  const uint64_t* votes = gpu_host::warp_exchange(mask, vote, where);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(votes[lane] != 0) << lane;
  return bits;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, Where where = Where::current()) {
  gpu_host::warp_exchange(mask, 0, where);
}
inline bool __any_sync(unsigned mask, bool vote, Where where = Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __syncthreads_or(int vote, Where where = Where::current()) {
  return gpu_host::block_or(vote != 0, where);
}
inline void gpu_named_barrier(int id, int threads, Where where = Where::current()) {
  gpu_host::named_barrier(id, threads, where);
}
inline void gpu_grid_sync(Where where = Where::current()) { gpu_host::grid_barrier(where); }

// Atomics let other threads go first now and then.
inline int atomicOr(int* at, int bits) {
  gpu_host::pause();
  return __atomic_fetch_or(at, bits, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicAdd(T* at, T by) {
  gpu_host::pause();
  return __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}

inline void __threadfence() { gpu_host::thread_fence(); }
inline int gpu_load_acquire(const int* from) {
  gpu_host::pause();
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}
inline void gpu_store_release(int* to, int value) {
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
  gpu_host::pause();
}

inline uint4 gpu_load16(const void* from, Where where = Where::current()) {
  gpu_host::check_aligned(from, where);
  return *static_cast<const uint4*>(from);
}
inline uint4 gpu_load16_streaming(const void* from, Where where = Where::current()) {
  return gpu_load16(from, where);
}
inline void gpu_store16(void* to, uint4 value, Where where = Where::current()) {
  gpu_host::check_aligned(to, where);
  *static_cast<uint4*>(to) = value;
}

// Copies are performed at the wait that allows their use, in the waiting thread, where sanitizers
// see each access and its line.
inline void gpu_copy16_async(void* to_shared, const void* from, Where where = Where::current()) {
  gpu_host::check_aligned(to_shared, where);
  gpu_host::check_aligned(from, where);
  gpu_host::copy_async(to_shared, from);
}
inline void gpu_copies_commit() { gpu_host::copies_commit(); }
template <int pending>
inline void gpu_copies_wait() {
  while (gpu_host::Copy* copy = gpu_host::copy_due(pending)) {
    *static_cast<uint4*>(copy->to) = *static_cast<const uint4*>(copy->from);
  }
}

inline void gpu_mbarrier_init(uint64_t* barrier, int arrivals, Where where = Where::current()) {
  gpu_host::mbarrier_init(barrier, arrivals, where);
}
inline void gpu_mbarrier_arrive(uint64_t* barrier, Where where = Where::current()) {
  gpu_host::mbarrier_arrive(barrier, 0, where);
}
inline void gpu_mbarrier_arrive_expect(uint64_t* barrier, int bytes,
                                       Where where = Where::current()) {
  gpu_host::mbarrier_arrive(barrier, bytes, where);
}
inline void gpu_copy_bulk(void* to_shared, const void* from, int bytes, uint64_t* barrier,
                          Where where = Where::current()) {
  gpu_host::copy_bulk({to_shared, from, bytes, where}, barrier);
}
inline void gpu_mbarrier_wait(uint64_t* barrier, unsigned phase, Where where = Where::current()) {
  gpu_host::mbarrier_wait(barrier, phase, where);
  while (gpu_host::BulkCopy* copy = gpu_host::bulk_copy_due(barrier)) {
    for (int i = 0; i < copy->bytes / 16; ++i) {
      static_cast<uint4*>(copy->to)[i] = static_cast<const uint4*>(copy->from)[i];
    }
    gpu_host::bulk_copy_done(barrier, *copy);
  }
}
inline void gpu_fence_bulk_copies() { gpu_host::fence_bulk_copies(); }

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline float __fmul_rn(float a, float b) { return a * b; }  // x86-64 without FMA rounds each
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int min(int a, int b) { return a < b ? a : b; }

inline float gpu_exp2(float x) { return exp2f(x); }
inline float gpu_log(float x) { return logf(x); }
inline float gpu_erf(float x) { return erff(x); }
inline float gpu_sqrt(float x) { return sqrtf(x); }

inline int gpu_multiprocessors() { return 2; }  // few blocks: each takes several pieces of work

template <typename... Parameters, typename... Arguments>
void gpu_launch(const GpuLaunch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  gpu_host::launch({how.blocks, how.threads, how.shared_bytes, how.cooperative},
                   [&] { kernel(arguments...); });
}
