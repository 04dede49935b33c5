// The host engine: runs a kernel's threads on a CPU, each as a fiber, one at a time.
//
// Blocks, warps and lanes take turns in a random but repeatable order that changes at barriers,
// warp operations and atomics. Warps have random priorities (probabilistic concurrency testing,
// Burckhardt et al. 2010): a warp may run far ahead of the others, which is what finds a missing
// barrier. Shared memory starts as NaN, each array in its own allocation.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <vector_types.h>

#include <functional>

namespace gpu_host {

// A place in the source, that of the call which has it as a default argument.
struct Where {
  const char* file;
  int line;
  static constexpr Where current(const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Indices {
  uint3 thread;
  uint3 block;
  uint3 threads;
  uint3 blocks;
};

struct Copy {
  void* to;
  const void* from;
};
struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  Where where;
};

// What a launch is made of.
struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool cooperative;
};

// Runs `body` once for each thread of each block. Throws what a thread threw, and std::logic_error
// for divergent barriers, misaligned accesses, bulk copies that nobody waits for and threads that
// wait for ever.
void launch(const Shape& shape, const std::function<void()>& body);

// What the thread that runs now may ask and do.
const Indices& indices();
int lane();
void* shared_memory(size_t bytes, Where where);
void* dynamic_shared_memory();
void block_barrier(Where where);
void named_barrier(int id, int threads, Where where);
void grid_barrier(Where where);
bool block_or(bool vote, Where where);
const uint64_t* warp_exchange(unsigned mask, uint64_t value, Where where);
void pause();  // lets other threads go first now and then
void thread_fence();
void check_aligned(const void* address, Where where);
void copy_async(void* to, const void* from);
void copies_commit();
Copy* copy_due(int pending);  // the next copy of a group older than `pending` newest, or null
void mbarrier_init(const void* barrier, int arrivals, Where where);
void mbarrier_arrive(const void* barrier, int expected_bytes, Where where);
void copy_bulk(const BulkCopy& copy, const void* barrier);
void mbarrier_wait(const void* barrier, unsigned phase, Where where);
BulkCopy* bulk_copy_due(const void* barrier);  // the next of the phases that have ended, or null
void bulk_copy_done(const void* barrier, const BulkCopy& copy);
void fence_bulk_copies();

}  // namespace gpu_host
