#include "host/engine.h"

#include <string.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/controls.h"
#include "host/fiber.h"

#ifndef __x86_64__
#error "the host engine switches stacks in x86-64 assembly"
#endif
asm(R"(
.text
.globl gpu_host_switch
.type gpu_host_switch, @function
gpu_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gpu_host_switch, . - gpu_host_switch
)");

namespace gpu_host {
namespace {

constexpr int kWarpSize = 32;
constexpr int kResidentBlocks = 3;  // this many take turns; the others wait for a place
constexpr int kDemoteOneIn = 64;    // scheduling steps after which a warp loses its priority

enum class State { kReady, kWaiting, kDone };

// Threads that meet. Two phases in turn: none can be more than one ahead of the others.
struct Meeting {
  int arrived = 0;
  int phase = 0;
  Where where{};
  uint64_t values[2][kWarpSize] = {};
  bool any[2] = {};
  char tsan_tag[2] = {};
};

struct Block;
struct Warp;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Indices indices{};
  State state = State::kReady;
  Where waits_at{};
  int commits = 0;
  std::deque<std::pair<int, Copy>> copies;  // the number of the group, and the copy
  Copy due{};
};

struct Warp {
  Thread* lanes[kWarpSize] = {};
  uint64_t priority = 0;
  Meeting meeting;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Meeting barrier;
  int done = 0;
  std::map<std::pair<std::string, int>, std::unique_ptr<char, decltype(&free)>> shared;
};

struct Engine {
  std::mt19937_64 random{0};
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::unique_ptr<Block>> spare;  // finished, their stacks to be used again
  Fiber scheduler;
  Thread* current = nullptr;
  std::exception_ptr error;
  uint64_t lowest = 0;  // priorities handed out to demoted warps count down from the middle
  char tsan_launch = 0;
  char tsan_done = 0;
};

Engine engine;

void tsan_release([[maybe_unused]] char* tag) {
#ifdef GPU_HOST_TSAN
  __tsan_release(tag);
#endif
}
void tsan_acquire([[maybe_unused]] char* tag) {
#ifdef GPU_HOST_TSAN
  __tsan_acquire(tag);
#endif
}

std::string text(Where where) {
  const char* slash = strrchr(where.file, '/');
  return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

void yield() {
  Thread* self = engine.current;
  self->fiber.switch_to(engine.scheduler);
}

void entry() {
  Thread* self = engine.current;
  self->fiber.arrived();
  tsan_acquire(&engine.tsan_launch);
  try {
    (*engine.body)();
  } catch (...) {
    if (!engine.error) engine.error = std::current_exception();
  }
  tsan_release(&engine.tsan_done);
  self->state = State::kDone;
  ++self->block->done;
  for (;;) yield();
}

// Waits until `expected` threads have come to this meeting; returns the phase they met in.
template <typename Wake>
int meet(Meeting& meeting, int expected, Where where, Wake wake) {
  Thread* self = engine.current;
  if (meeting.arrived == 0) {
    meeting.where = where;
  } else if (meeting.where.line != where.line || strcmp(meeting.where.file, where.file) != 0) {
    throw std::logic_error("divergent barriers: threads of one group wait at " +
                           text(meeting.where) + " and at " + text(where));
  }
  const int phase = meeting.phase;
  tsan_release(&meeting.tsan_tag[phase]);
  self->state = State::kWaiting;
  self->waits_at = where;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    meeting.phase = 1 - phase;
    wake();
  }
  yield();
  tsan_acquire(&meeting.tsan_tag[phase]);
  return phase;
}

int meet_block(Where where) {
  Block* block = engine.current->block;
  return meet(block->barrier, static_cast<int>(block->threads.size()), where, [block] {
    for (auto& thread : block->threads) thread->state = State::kReady;
  });
}

std::unique_ptr<Block> start_block(int64_t index, int64_t blocks, int threads) {
  std::unique_ptr<Block> block;
  if (!engine.spare.empty()) {
    block = std::move(engine.spare.back());
    engine.spare.pop_back();
  } else {
    block = std::make_unique<Block>();
  }
  block->barrier = Meeting{};
  block->done = 0;
  block->shared.clear();
  block->threads.resize(threads);
  block->warps.assign(threads / kWarpSize, Warp{});
  for (Warp& warp : block->warps) warp.priority = engine.random() | (uint64_t{1} << 63);
  for (int i = 0; i < threads; ++i) {
    auto& thread = block->threads[i];
    if (!thread) thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->warp = &block->warps[i / kWarpSize];
    thread->lane = i % kWarpSize;
    thread->warp->lanes[thread->lane] = thread.get();
    thread->indices = {{static_cast<unsigned>(i), 0, 0},
                       {static_cast<unsigned>(index), 0, 0},
                       {static_cast<unsigned>(threads), 1, 1},
                       {static_cast<unsigned>(blocks), 1, 1}};
    thread->state = State::kReady;
    thread->commits = 0;
    thread->copies.clear();
    thread->fiber.prepare(entry);
  }
  return block;
}

bool has_ready(const Warp& warp) {
  return std::any_of(std::begin(warp.lanes), std::end(warp.lanes),
                     [](const Thread* thread) { return thread->state == State::kReady; });
}

Warp* pick_warp() {
  Warp* best = nullptr;
  for (auto& block : engine.resident) {
    for (Warp& warp : block->warps) {
      if ((best == nullptr || warp.priority > best->priority) && has_ready(warp)) best = &warp;
    }
  }
  return best;
}

void run_warp(Warp& warp) {
  if (engine.random() % kDemoteOneIn == 0) warp.priority = --engine.lowest;
  const bool backwards = engine.random() % 2 != 0;
  for (int i = 0; i < kWarpSize && !engine.error; ++i) {
    Thread* thread = warp.lanes[backwards ? kWarpSize - 1 - i : i];
    if (thread->state != State::kReady) continue;
    engine.current = thread;
    engine.scheduler.switch_to(thread->fiber);
  }
}

// Nothing can run, and not all has ended.
std::string describe_deadlock() {
  std::string places;
  std::string last;
  bool returned = false;
  for (auto& block : engine.resident) {
    for (auto& thread : block->threads) {
      returned = returned || thread->state == State::kDone;
      if (thread->state != State::kWaiting || text(thread->waits_at) == last) continue;
      last = text(thread->waits_at);
      if (places.find(last) == std::string::npos) places += (places.empty() ? "" : " and ") + last;
    }
  }
  return "divergent barriers: threads wait at " + places +
         (returned ? " for threads that have returned" : "");
}

void run_all(int64_t blocks, int threads) {
  const Unseen unseen;
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), engine.random);
  size_t next = 0;
  while (!engine.error) {
    while (engine.resident.size() < kResidentBlocks && next < order.size()) {
      engine.resident.push_back(start_block(order[next++], blocks, threads));
    }
    if (engine.resident.empty()) return;
    Warp* warp = pick_warp();
    if (warp == nullptr) {
      engine.error = std::make_exception_ptr(std::logic_error(describe_deadlock()));
      return;
    }
    run_warp(*warp);
    for (size_t i = engine.resident.size(); i-- > 0;) {
      if (engine.resident[i]->done < threads) continue;
      engine.resident[i]->shared.clear();
      engine.spare.push_back(std::move(engine.resident[i]));
      engine.resident.erase(engine.resident.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

}  // namespace

void launch(int64_t blocks, int threads, const std::function<void()>& body) {
  if (threads % kWarpSize != 0) throw std::logic_error("a block must be whole warps");
  engine.body = &body;
  engine.error = nullptr;
  engine.lowest = uint64_t{1} << 62;
  engine.scheduler.adopt_current();
  tsan_release(&engine.tsan_launch);
  run_all(blocks, threads);
  tsan_acquire(&engine.tsan_done);
  // After an error, threads that had not ended are abandoned with their stacks.
  for (auto& block : engine.resident) engine.spare.push_back(std::move(block));
  engine.resident.clear();
  engine.current = nullptr;
  if (engine.error) std::rethrow_exception(engine.error);
}

void set_schedule(uint64_t seed) { engine.random.seed(seed); }

void poison([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(reinterpret_cast<void*>(address), bytes);
#endif
}
void unpoison([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(reinterpret_cast<void*>(address), bytes);
#endif
}

const Indices& indices() { return engine.current->indices; }

int lane() { return engine.current->lane; }

void* shared_memory(size_t bytes, Where where) {
  const Unseen unseen;
  auto& shared = engine.current->block->shared;
  const auto key = std::make_pair(std::string(where.file), where.line);
  auto found = shared.find(key);
  if (found == shared.end()) {
    char* memory = static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
    memset(memory, 0xff, bytes);  // NaN in each floating type
    found = shared.emplace(key, std::unique_ptr<char, decltype(&free)>(memory, &free)).first;
  }
  return found->second.get();
}

void block_barrier(Where where) { meet_block(where); }

bool block_or(bool vote, Where where) {
  Meeting& barrier = engine.current->block->barrier;
  if (barrier.arrived == 0) barrier.any[barrier.phase] = false;
  barrier.any[barrier.phase] = barrier.any[barrier.phase] || vote;
  return barrier.any[meet_block(where)];
}

const uint64_t* warp_exchange(unsigned mask, uint64_t value, Where where) {
  if (mask != 0xffffffffu) throw std::logic_error(text(where) + ": the mask is not a whole warp");
  Warp* warp = engine.current->warp;
  warp->meeting.values[warp->meeting.phase][engine.current->lane] = value;
  const int phase = meet(warp->meeting, kWarpSize, where, [warp] {
    for (Thread* thread : warp->lanes) thread->state = State::kReady;
  });
  return warp->meeting.values[phase];
}

void pause() {
  if (engine.random() % 4 != 0) return;
  engine.current->warp->priority = --engine.lowest;
  yield();
}

void check_aligned(const void* address, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw std::logic_error("misaligned 16-byte access at " + text(where));
}

void copy_async(void* to, const void* from) {
  const Unseen unseen;
  memset(to, 0xff, sizeof(uint4));  // whatever was there is not to be read any more
  engine.current->copies.emplace_back(engine.current->commits, Copy{to, from});
}

void copies_commit() { ++engine.current->commits; }

Copy* copy_due(int pending) {
  const Unseen unseen;
  Thread* self = engine.current;
  if (self->copies.empty() || self->copies.front().first >= self->commits - pending) return nullptr;
  self->due = self->copies.front().second;
  self->copies.pop_front();
  return &self->due;
}

}  // namespace gpu_host
