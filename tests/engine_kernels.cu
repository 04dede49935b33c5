// Kernels for the primitives of gpu.cuh, and ways to get each wrong: test_cuda_host_engine.py plants
// one at a time and wants to see it found.
#include <string>

#include "gpu.cuh"
#ifndef __CUDACC__
#include "host/controls.h"
#endif

namespace {

enum Fault {
  kNone,
  kNoBarrier,
  kNoWait,
  kNoReuseWait,
  kTooFewBytes,
  kTooManyBytes,
  kShortCopy,
  kMisaligned,
  kNoArrive,
  kNoInit,
  kNoFence,
  kWrongCount,
  kUnequalCounts,
  kPlainStore,
  kRelaxedLoad,
  kSomeBlocks,
  kNotCooperative,
  kTooLittleMemory,
};

struct Args {
  const float* x;
  float* y;        // what comes out
  float* scratch;  // as long
  int* words;      // two, zero
  int count;
  int fault;
};

// y = x backwards, through dynamic shared memory. One block, a thread an element.
GPU_KERNEL(1024) reverse_kernel(Args a) {
  GPU_DYN_SHARED(float, all);
  const int i = threadIdx.x;
  all[i] = a.x[i];
  if (a.fault != kNoBarrier) __syncthreads();
  a.y[i] = all[a.count - 1 - i];
}

// y = 2 x, by one warp that fills two stages in turn and one that empties them.
GPU_KERNEL(64) pipeline_kernel(Args a) {
  constexpr int kStage = 128;  // floats, four a lane
  GPU_SHARED(float, stages, 2 * kStage);
  GPU_SHARED(uint64_t, full, 2);
  GPU_SHARED(uint64_t, empty, 2);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2 && a.fault != kNoInit) {
    gpu_mbarrier_init(full + threadIdx.x, 1);
    gpu_mbarrier_init(empty + threadIdx.x, 32);
  }
  __syncthreads();
  const int tiles = a.count / kStage;
  for (int tile = 0; tile < tiles; ++tile) {
    float* stage = stages + tile % 2 * kStage;
    const float* from = a.x + tile * kStage;
    if (threadIdx.x < 32) {
      if (tile >= 2 && a.fault != kNoReuseWait) gpu_mbarrier_wait(empty + tile % 2, tile / 2 - 1);
      if (lane > 0) continue;
      const int bytes = kStage * 4;
      const int wrong = a.fault == kTooFewBytes ? -16 : a.fault == kTooManyBytes ? 16 : 0;
      gpu_mbarrier_arrive_expect(full + tile % 2, bytes + wrong);
      gpu_copy_bulk(stage, from + (a.fault == kMisaligned), bytes - (a.fault == kShortCopy ? 4 : 0),
                    full + tile % 2);
    } else {
      const bool last = tile == tiles - 1;
      if (a.fault != kNoWait || !last) gpu_mbarrier_wait(full + tile % 2, tile / 2);
      for (int i = lane; i < kStage; i += 32) stage[i] *= 2.0f;  // in place, to need the fence
      for (int i = lane; i < kStage; i += 32) a.y[tile * kStage + i] = stage[i];
      if (a.fault != kNoFence) gpu_fence_bulk_copies();
      if (a.fault != kNoArrive) gpu_mbarrier_arrive(empty + tile % 2);
    }
  }
}

// y = x, from warp 0 to warp 1; warp 2 has no part in it and does not wait.
GPU_KERNEL(96) handover_kernel(Args a) {
  GPU_SHARED(float, box, 32);
  const int lane = threadIdx.x % 32;
  const int threads = a.fault == kWrongCount ? 96 : 64;
  if (threadIdx.x < 32) {
    box[lane] = a.x[lane];
    if (a.fault != kNoBarrier) gpu_named_barrier(1, threads);
  } else if (threadIdx.x < 64) {
    if (a.fault != kNoBarrier) gpu_named_barrier(1, a.fault == kUnequalCounts ? 96 : threads);
    a.y[lane] = box[lane];
  }
}

// y = x, by way of scratch: block 0 fills it and says so, block 1 reads it.
GPU_KERNEL(32) message_kernel(Args a) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    a.scratch[i] = a.x[i];
    __syncthreads();
    if (i > 0) return;
    if (a.fault == kPlainStore) {
      *a.words = 1;
    } else {
      gpu_store_release(a.words, 1);
    }
  } else {
    const auto arrived = [&] {
      return (a.fault == kRelaxedLoad ? atomicAdd(a.words, 0) : gpu_load_acquire(a.words)) != 0;
    };
    while (i == 0 && !arrived()) {
    }
    __syncthreads();
    a.y[i] = a.scratch[i];
  }
}

// y = x, by way of scratch: each block fills a part, and the last to come reads all.
GPU_KERNEL(32) last_block_kernel(Args a) {
  GPU_SHARED(int, before, 1);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  a.scratch[i] = a.x[i];
  if (a.fault != kNoFence) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicAdd(a.words, 1);
  __syncthreads();
  if (*before + 1 < static_cast<int>(gridDim.x)) return;
  if (a.fault != kNoFence) __threadfence();
  for (int at = threadIdx.x; at < a.count; at += 32) a.y[at] = a.scratch[at];
}

// y = x, by way of scratch: each block fills a part, and then reads that of the next.
GPU_KERNEL(32) rotate_kernel(Args a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  a.scratch[i] = a.x[i];
  if (a.fault != kNoBarrier && !(a.fault == kSomeBlocks && blockIdx.x == 1)) gpu_grid_sync();
  const int other = (i + 32) % a.count;
  a.y[other] = a.scratch[other];
}

GpuLaunch launch_of(const std::string& name, const Args& a) {
  const int bytes = (a.count - (a.fault == kTooLittleMemory)) * 4;
  if (name == "reverse") return {1, a.count, nullptr, bytes, false};
  if (name == "pipeline") return {1, 64, nullptr, 0, false};
  if (name == "handover") return {1, 96, nullptr, 0, false};
  return {a.count / 32, 32, nullptr, 0, name == "rotate" && a.fault != kNotCooperative};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifndef __CUDACC__
EXPORT void set_schedule(uint64_t seed) { gpu_host::set_schedule(seed); }
#endif

// What went wrong, or null.
EXPORT const char* run(const char* name, Args a) {
  static std::string error;
  const std::string wanted = name;
  try {
    const auto kernel = wanted == "reverse"      ? reverse_kernel
                        : wanted == "pipeline"   ? pipeline_kernel
                        : wanted == "handover"   ? handover_kernel
                        : wanted == "message"    ? message_kernel
                        : wanted == "last_block" ? last_block_kernel
                                                 : rotate_kernel;
    gpu_launch(launch_of(wanted, a), kernel, a);
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
  return nullptr;
}
