// The engine's own state: blocks, warps and threads under way. Kernels do not see it.
#pragma once

#include <stdlib.h>

#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "host/engine.h"
#include "host/fiber.h"

namespace gpu_host {

constexpr int kWarpSize = 32;

enum class State { kReady, kWaiting, kDone };

struct Block;
struct Warp;
struct Thread;

// Threads that meet. Two phases in turn: none can be more than one ahead of the others.
struct Meeting {
  std::vector<Thread*> waiting;
  int phase = 0;
  int expected = 0;  // of a named barrier
  Where where{};
  uint64_t values[2][kWarpSize] = {};
  bool any[2] = {};
  char tsan_tag[2] = {};
};

// A barrier in shared memory. A phase ends when all have arrived and no byte is missing.
struct Mbarrier {
  int arrivals = 0;
  int pending = 0;
  int64_t missing = 0;  // bytes expected less those of the copies issued
  unsigned phase = 0;
  Where expected_at{};
  std::vector<BulkCopy> issued;  // in this phase
  std::deque<BulkCopy> due;      // of phases that have ended; performed at a wait
  std::vector<Thread*> waiting;
  char tsan_tag[2] = {};
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Indices indices{};
  State state = State::kReady;
  Where waits_at{};
  const Mbarrier* waits_for = nullptr;
  int commits = 0;
  std::deque<std::pair<int, Copy>> copies;  // the number of the group, and the copy
  Copy due{};
  BulkCopy bulk_due{};
};

struct Warp {
  Thread* lanes[kWarpSize] = {};
  uint64_t priority = 0;
  Meeting meeting;
};

using Memory = std::unique_ptr<char, decltype(&free)>;

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Meeting barrier;
  std::map<int, Meeting> named;
  int done = 0;
  std::map<std::pair<std::string, int>, Memory> shared;
  Memory dynamic{nullptr, &free};
  std::map<const void*, Mbarrier> mbarriers;
  std::map<char*, std::string> bulk_bytes;  // what bulk copies wrote since the last fence
};

struct Engine {
  std::mt19937_64 random{0};
  const std::function<void()>* body = nullptr;
  Shape shape{};
  Meeting grid;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::unique_ptr<Block>> spare;  // finished, their stacks to be used again
  Fiber scheduler;
  Thread* current = nullptr;
  std::exception_ptr error;
  uint64_t lowest = 0;  // priorities handed out to demoted warps count down from the middle
  bool ended = false;   // whether a block has ended
  char tsan_launch = 0;
  char tsan_done = 0;
  char tsan_fence = 0;
};

extern Engine engine;

inline void tsan_release([[maybe_unused]] char* tag) {
#ifdef GPU_HOST_TSAN
  __tsan_release(tag);
#endif
}
inline void tsan_acquire([[maybe_unused]] char* tag) {
#ifdef GPU_HOST_TSAN
  __tsan_acquire(tag);
#endif
}

std::string text(Where where);  // file.cuh:line
Memory poisoned_memory(size_t bytes);
void yield();
void queue_up(std::vector<Thread*>& waiting, Where where);  // then yield(), until
void wake(std::vector<Thread*>& waiting);
void check_finished(const Block& block);  // throws where copies are still under way

}  // namespace gpu_host
